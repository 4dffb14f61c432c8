"""Order tables: for each rank the list of forward and backward passes it computes, in order.

A schedule is a pure function from sizes to such lists. It contains no communication (``lowering.py`` inserts it) and no
timing (``simulate.py`` measures it), and one engine runs them all. A new schedule is one function and one line in
``SCHEDULES``; the property tests pick it up from there.

Stages hold ``num_chunks`` model chunks each; chunk ``c`` of rank ``r`` is the global *virtual stage* ``c * P + r``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Compute:
    """One pass of one micro-batch through one chunk of the rank that owns the table."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


Table = list[Compute]
Pass = tuple[Kind, int, int]
"""A pass in global terms: kind, virtual stage, micro-batch."""


def dependencies(kind: Kind, stage: int, micro_batch: int, num_stages: int) -> list[Pass]:
    """Passes that must have ended before this one can start."""
    if kind == "forward":
        return [("forward", stage - 1, micro_batch)] if stage > 0 else []
    downstream: list[Pass] = [("backward", stage + 1, micro_batch)] if stage < num_stages - 1 else []
    return [("forward", stage, micro_batch), *downstream]


def one_forward_one_backward(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Compute]:
    """1F1B (PipeDream-flush): warm up with forwards, then alternate, then drain the backwards.

    Rank r holds at most ``num_ranks - r`` activations; bubble ``(P - 1) / (m + P - 1)`` (arXiv 2104.04473, 2.2).
    """
    warmup = min(num_ranks - rank - 1, num_micro_batches)
    for micro_batch in range(warmup):
        yield Compute("forward", micro_batch)
    for micro_batch in range(num_micro_batches - warmup):
        yield Compute("forward", warmup + micro_batch)
        yield Compute("backward", micro_batch)
    for micro_batch in range(num_micro_batches - warmup, num_micro_batches):
        yield Compute("backward", micro_batch)


def forward_only(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Compute]:
    """Evaluation: every micro-batch forward, in order."""
    del rank, num_ranks
    for micro_batch in range(num_micro_batches):
        yield Compute("forward", micro_batch)


SCHEDULES: dict[str, Callable[[int, int, int], Iterator[Compute]]] = {"1f1b": one_forward_one_backward}
"""Training schedules by the ``kind`` of ``parallel.schedule``."""


def tables(
    schedule: Callable[[int, int, int], Iterator[Compute]], num_ranks: int, num_micro_batches: int
) -> list[Table]:
    """The table of every rank."""
    return [list(schedule(rank, num_ranks, num_micro_batches)) for rank in range(num_ranks)]
