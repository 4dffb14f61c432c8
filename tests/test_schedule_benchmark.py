"""The schedule benchmark's processes run, and their engines compute the same as DeepSpeed's."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
import schedule_processes  # noqa: E402
from network import obstacle  # noqa: E402
from schedule_work import Contestant  # noqa: E402

from megatron_ds.pipeline.simulate import Durations  # noqa: E402


def test_steps_of_all_engines(monkeypatch):
    """Two ranks, short sleeps: nobody is faster than the simulation, and every measure is there."""
    monkeypatch.setattr(schedule_processes, "STEP_RANKS", 2)
    monkeypatch.setattr(schedule_processes, "STEP_MICRO_BATCHES", (2,))
    report = harness.Report("")
    schedule_processes.compare_steps(report, rounds=1)
    medians = {measure.name: measure.median for measure in report.measures}
    for contestant in schedule_processes.OURS:
        least = 1e3 * schedule_processes.makespan(contestant, 2, 2, schedule_processes.COMPUTE)
        assert medians[f"B p = 2, m = 2, {contestant.schedule}: step"] >= least
    assert medians["B p = 2, m = 2, deepspeed: step"] >= 180
    goals = [measure.at_most for measure in report.measures if measure.goal]
    assert goals == [schedule_processes.POINTS] * 4, "only eight micro-batches have a goal beside DeepSpeed"


def test_groups_on_links_or_the_reason_why_not(monkeypatch, capsys):
    """With one group and with two the steps compute the same; without a network that is said."""
    monkeypatch.setattr(schedule_processes, "LINKS", ((2, Durations(0.0, 0.0, 0.0), False),))
    monkeypatch.setattr(schedule_processes, "LINK_MICRO_BATCHES", 2)
    report = harness.Report("")
    schedule_processes.compare_links(report, rounds=1)
    if reason := obstacle():
        assert capsys.readouterr().out == f"SKIPPED part C: {reason}\n" and not report.measures
        return
    # Four messages of a mebibyte on a line of 200 Mbit/s, less what passes in a burst.
    one_way = [m.median for m in report.measures if m.unit == "ms"]
    assert len(one_way) == 2 * len(schedule_processes.LINK_SCHEDULES) and min(one_way) > 80


def test_bubble():
    one = Contestant("1f1b")
    step = schedule_processes.makespan(one, 4, 8, schedule_processes.COMPUTE)
    assert step == pytest.approx(0.66)
    assert schedule_processes.bubble(step, 8) == pytest.approx(100 * 3 / 11)
