"""Warnings: after as many steps in a row as configured, once, and once more when it is over."""

import random

import pytest
from expert_loads import expert_load

from megatron_ds.config.schema import MonitorConfig
from megatron_ds.train.expert_watch import ExpertWatch


def said(loads, **monitor):
    """What the watch says to the loads of steps 1, 2 ..."""
    lines = []
    watch = ExpertWatch(MonitorConfig(**{"dead_expert_steps": 3} | monitor), lines.append)
    for step, load in enumerate(loads, start=1):
        watch.step(step, load)
    return lines


def layer_0(*rows):
    return [expert_load([list(row)], bias=[[0.0] * len(row)]) for row in rows]


ALIVE, DEAD = (4, 4, 4), (4, 0, 4)


def test_a_dead_expert_is_named_once_and_once_more_when_it_revives():
    assert said(layer_0(*[DEAD] * 7, ALIVE, *[DEAD] * 2)) == [
        "step 3: layer 0: expert 1 received nothing for 3 steps; raise --moe-router-bias-update-rate",
        "step 8: layer 0: expert 1 received tokens again",
    ]


def test_a_shorter_drought_is_no_trouble():
    assert said(layer_0(*([DEAD] * 2 + [ALIVE]) * 4)) == []


def test_an_expert_can_die_again():
    assert [line.split(":")[0] for line in said(layer_0(*([DEAD] * 3 + [ALIVE]) * 2))] == [
        "step 3",
        "step 4",
        "step 7",
        "step 8",
    ]


def test_each_layer_is_named_by_its_place_in_the_decoder():
    load = expert_load([[2, 2], [0, 4], [4, 0]], layers=[1, 3, 5])
    assert said([load] * 3) == [
        "step 3: layer 3: expert 0 received nothing for 3 steps; raise --moe-aux-loss-coeff",
        "step 3: layer 5: expert 1 received nothing for 3 steps; raise --moe-aux-loss-coeff",
    ]


def test_many_experts_are_counted():
    dead = [0] * 12 + [1] * 12
    assert said(layer_0(*[dead] * 3))[0].startswith(
        "step 3: layer 0: experts 0, 1, 2, 3, 4, 5, 6, 7 and 4 more received nothing"
    )


def test_a_layer_that_stays_out_of_balance_is_named_once_until_it_is_back():
    over, under = (10, 1, 1), (2, 2, 2)
    assert said(layer_0(over, over, under, *[over] * 5, under), max_expert_imbalance=2.0) == [
        "step 6: layer 0: the busiest expert had more than 2 times the mean load for 3 steps (expert 0 now has 2.5); "
        "raise --moe-router-bias-update-rate",
        "step 9: layer 0: the busiest expert is back at 1.0 times the mean load",
    ]


def test_the_limit_itself_is_allowed():
    assert said(layer_0(*[(4, 1, 1)] * 5), max_expert_imbalance=2.0) == []


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_messages_equal_a_plain_count(patience):
    generator = random.Random(patience)
    rows = [[generator.choice((0, 0, 1)) for _ in range(3)] for _ in range(200)]
    want, length = [], [0, 0, 0]
    for step, row in enumerate(rows, start=1):
        events = {"nothing": [], "again": []}
        for expert, count in enumerate(row):
            if count and length[expert] >= patience:
                events["again"].append(expert)
            length[expert] = 0 if count else length[expert] + 1
            if length[expert] == patience:
                events["nothing"].append(expert)
        want += [(step, kind, experts) for kind, experts in events.items() if experts]
    got = []
    for line in said(layer_0(*rows), dead_expert_steps=patience, max_expert_imbalance=100.0):
        place, _, rest = line.split(": ")
        names, kind = ("nothing" if "nothing" in rest else "again"), rest.split(" received")[0]
        got.append((int(place.split()[1]), names, [int(word.strip(",")) for word in kind.split()[1:]]))
    assert got == want
    assert len(want) > 10
