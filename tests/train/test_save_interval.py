"""When to save: fixed intervals, and the interval that follows from the cost of a save and of a failure."""

import itertools
import math

import pytest

from megatron_ds.train.save_interval import PROBE_STEPS, SECONDS_PER_DAY, SaveInterval


def interval(value, **changes):
    return SaveInterval(value, **({"step": 0, "num_nodes": 1, "node_days_per_failure": 264.0} | changes))


@pytest.mark.parametrize(("value", "steps"), [(3, [3, 6, 9]), (1, list(range(1, 11))), (None, [])])
def test_fixed(value, steps):
    assert [step for step in range(1, 11) if interval(value).due(step)] == steps


def test_auto_probes_then_weighs():
    nodes, days, step_seconds, stall = 128, 264.0, 0.5, 0.25
    saves = interval("auto", num_nodes=nodes, node_days_per_failure=days)
    taken = []
    for step in range(1, 2000):
        saves.took_step(step_seconds)
        if saves.due(step):
            taken.append(step)
            saves.saved(step, saves.estimate())
            saves.took_save(stall, write_seconds=1.0)
    best = math.sqrt(2 * stall * days * SECONDS_PER_DAY / nodes) / step_seconds
    assert taken[:2] == [PROBE_STEPS, 2 * PROBE_STEPS]
    assert {b - a for a, b in itertools.pairwise(taken[1:])} == {round(best)}


def test_auto_is_the_cheapest_interval():
    """Expected loss per second: a save every T, and half of T at every failure."""
    stall, between = 2.0, 264.0 * SECONDS_PER_DAY / 16

    def lost(seconds):
        return stall / seconds + seconds / 2 / between

    saves = interval("auto", num_nodes=16)
    saves.took_step(1.0)
    saves.took_save(stall, 1.0)
    best = saves.estimate()
    assert lost(best) <= min(lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_auto_waits_for_a_slow_disk():
    saves = interval("auto", num_nodes=100_000)
    saves.took_step(1.0)
    saves.took_save(0.01, write_seconds=300.0)
    assert saves.estimate() == 600


def test_auto_counts_from_where_the_run_resumed():
    saves = interval("auto", step=1234)
    assert next(step for step in range(1235, 1250) if saves.due(step)) == 1234 + PROBE_STEPS
