"""Saves beside training, and throughput: parts A and B of ``checkpoint.py``, on the ranks of ``checkpoint_rank.py``."""

from collections.abc import Sequence
from pathlib import Path

import harness
from checkpoint_work import DEEPSPEED, KEPT, NOBODY, OURS, PLAIN, TORCH, Turn
from network import Loopback, Ranks
from tqdm import tqdm

RANK_SCRIPT = Path(__file__).with_name("checkpoint_rank.py")
RANKS = 2
STEPS = 10
"""From one save to the next."""
STALL_AT_MOST = 0.5
"""Beside that of plain ``async_save``."""
PERCENT_AT_MOST = 2.0
"""Stall in percent of the steps between saves."""


def compare(report: harness.Report, directory: Path, rounds: int, mib: int, steps: int = STEPS) -> None:
    """Parts A and B with ``mib`` MiB of state per rank."""
    with Ranks(Loopback(), RANK_SCRIPT, RANKS) as ranks:
        ranks.call("prepare", directory, mib)
        for computes in (False, True):
            compare_stalls(report, ranks, rounds, computes, steps)
        compare_throughput(report, ranks, rounds)


def compare_stalls(report: harness.Report, ranks: Ranks, rounds: int, computes: bool, steps: int) -> None:
    """Part A: everybody in turn, after a turn without steps that is not counted."""
    savers = (OURS, PLAIN, KEPT)
    kind = "computing" if computes else "waiting"
    turns: dict[str, list[Turn]] = {name: [] for name in (NOBODY, *savers)}
    for number in tqdm(range(rounds + 1), desc=f"A {kind} steps", disable=None, leave=False):
        for name, samples in turns.items():
            per_rank = ranks.call("take_turn", name, computes, steps if number else 0)
            samples.append(slowest(per_rank))
    turns = {name: samples[1:] for name, samples in turns.items()}
    label = f"A {kind} steps"
    stalls = {name: [turn.call + turn.rest for turn in turns[name]] for name in savers}
    for name in savers:
        report.add(f"{label}, {name}: stall", "ms", [1e3 * stall for stall in stalls[name]])
    report.add_ratio(f"{label}: stall, {OURS} / {PLAIN}", stalls[OURS], stalls[PLAIN], at_most=STALL_AT_MOST)
    report.add_ratio(f"{label}: stall, {OURS} / {KEPT}", stalls[OURS], stalls[KEPT])
    share = [100 * stall / turn.steps for stall, turn in zip(stalls[OURS], turns[OURS], strict=True)]
    report.add(f"{label}, {OURS}: stall / {steps} steps", "%", share, at_most=PERCENT_AT_MOST)
    for name in savers:
        pairs = zip(turns[name], turns[NOBODY], strict=True)
        report.add(f"{label}, {name}: steps slower by", "%", [100 * (a.steps / b.steps - 1) for a, b in pairs])


def compare_throughput(report: harness.Report, ranks: Ranks, rounds: int) -> None:
    """Part B: everybody in turn, after a round that is not counted."""
    names = (OURS, TORCH, DEEPSPEED)
    speeds: dict[tuple[str, str], list[float]] = {
        (name, action): [] for action in ("save", "load, cold", "load, cached") for name in names
    }
    sizes = {}
    for _ in tqdm(range(rounds + 1), desc="B throughput", disable=None, leave=False):
        for name in names:
            seconds = {"save": max(ranks.call("save", name))}
            seconds |= {f"load, {how}": max(ranks.call("load", name, how == "cold")) for how in ("cold", "cached")}
            sizes[name] = ranks.call("size", name)[0]
            ranks.call("remove", name)
            for action, its_seconds in seconds.items():
                speeds[name, action].append(sizes[name] / its_seconds / 1e9)
    speeds = {key: samples[1:] for key, samples in speeds.items()}
    for name, size in sizes.items():
        report.add(f"B {name}: checkpoint", "MiB", size / 2**20)
    for (name, action), samples in speeds.items():
        report.add(f"B {action}: {name}", "GB/s", samples)
        if name != OURS:
            report.add_ratio(f"B {action}: {OURS} / {name}", speeds[OURS, action], samples)


def slowest(per_rank: Sequence[Turn]) -> Turn:
    """Of every part of a turn."""
    return Turn(*(max(getattr(turn, part) for turn in per_rank) for part in ("call", "steps", "rest")))
