"""Order tables: for each rank the list of forward and backward passes it computes, in order.

A schedule is a pure function from sizes to such lists. It contains no communication (``lowering.py`` inserts it) and no
timing (``simulate.py`` measures it), and one engine runs them all. A new schedule is one function and one line in
``SCHEDULES``; the property tests pick it up from there.

A rank holds one chunk of the model or several. The chunks of all ranks, in the order of the layers, are the *virtual
stages*; a ``Placement`` says where they are. A backward pass may come in two halves: ``backward_input``, for which the
previous stage waits, and ``backward_weight``, for which nobody does. In every schedule the passes of one kind through
one chunk are in the order of the micro-batches, so that gradients are summed to the same bits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_ds.config.resolve import nearest_multiples

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]


@dataclass(frozen=True)
class Compute:
    """One pass of one micro-batch through one chunk of the rank that owns the table."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


Table = list[Compute]
Pass = tuple[Kind, int, int]
"""A pass in global terms: kind, virtual stage, micro-batch; both forms of backward that pass a gradient on are
"backward" here."""


@dataclass(frozen=True)
class Placement:
    """Which rank holds which virtual stage: "loop" deals them out in rounds, "v" goes down the ranks and up again."""

    shape: Literal["loop", "v"]

    def stage(self, rank: int, chunk: int, num_ranks: int) -> int:
        """Virtual stage of a rank's chunk."""
        turned = self.shape == "v" and chunk % 2 == 1
        return chunk * num_ranks + (num_ranks - 1 - rank if turned else rank)

    def rank_and_chunk(self, stage: int, num_ranks: int) -> tuple[int, int]:
        """Who holds a virtual stage."""
        chunk, place = divmod(stage, num_ranks)
        turned = self.shape == "v" and chunk % 2 == 1
        return (num_ranks - 1 - place if turned else place), chunk


LOOP, V = Placement("loop"), Placement("v")


def global_kind(kind: Kind) -> Kind:
    """The kind of a pass as its dependants see it: they wait for gradients of inputs, however these were made."""
    return "backward" if kind == "backward_input" else kind


def dependencies(kind: Kind, stage: int, micro_batch: int, num_stages: int) -> list[Pass]:
    """Passes that must have ended before this one can start."""
    if kind == "forward":
        return [("forward", stage - 1, micro_batch)] if stage > 0 else []
    if kind == "backward_weight":
        return [("backward", stage, micro_batch)]
    downstream: list[Pass] = [("backward", stage + 1, micro_batch)] if stage < num_stages - 1 else []
    return [("forward", stage, micro_batch), *downstream]


# --- orders: (rank, ranks, micro-batches, chunks) -> the rank's table ------------------------------------------------


def one_forward_one_backward(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Iterator[Compute]:
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


def interleaved(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Iterator[Compute]:
    """Interleaved 1F1B (arXiv 2104.04473, 2.3): 1F1B over passes through chunks, P micro-batches per chunk in turn."""
    total = num_micro_batches * num_chunks

    def nth(kind: Kind, number: int) -> Compute:
        """The rank's pass ``number`` of a kind: rounds of P micro-batches through every chunk."""
        turn, within = divmod(number, num_ranks * num_chunks)
        chunk, place = divmod(within, num_ranks)
        return Compute(kind, turn * num_ranks + place, chunk if kind == "forward" else num_chunks - 1 - chunk)

    warmup = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, total)
    for number in range(warmup):
        yield nth("forward", number)
    for number in range(total - warmup):
        yield nth("forward", warmup + number)
        yield nth("backward", number)
    for number in range(total - warmup, total):
        yield nth("backward", number)


def zero_bubble_h1(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Iterator[Compute]:
    """ZB-H1 (arXiv 2401.10241, 4.1): 1F1B whose weight gradients lag by the rank, and fill what was the bubble.

    All ranks hold as many activations as the first one does under 1F1B.
    """
    weights = 0
    for compute in one_forward_one_backward(rank, num_ranks, num_micro_batches, num_chunks):
        if compute.kind == "forward":
            yield compute
            continue
        yield Compute("backward_input", compute.micro_batch)
        draining = compute.micro_batch >= num_micro_batches - (num_ranks - rank - 1)
        if compute.micro_batch >= rank or draining:
            yield Compute("backward_weight", weights)
            weights += 1
    for micro_batch in range(weights, num_micro_batches):
        yield Compute("backward_weight", micro_batch)


def zero_bubble_v(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Iterator[Compute]:
    """ZB-V (arXiv 2405.15362, 3): two chunks, so placed that the last stage is on the first rank.

    Each rank repeats one cycle of six passes; until it is full, and when no forward is left, parts of the cycle stand
    alone. With equal times for the three kinds of pass no rank waits between its first pass and its last, if there are
    2P - 1 micro-batches, and none holds more activations than the first one under 1F1B. Fewer micro-batches use the
    same table without the others.
    """
    down, up = 0, 1
    count: Counter[tuple[Kind, int]] = Counter()
    cycles = max(num_micro_batches, 2 * num_ranks - 1)

    def nth(kind: Kind, chunk: int) -> Iterator[Compute]:
        micro_batch = count[kind, chunk]
        count[kind, chunk] += 1
        if micro_batch < num_micro_batches:
            yield Compute(kind, micro_batch, chunk)

    def both(chunk: int) -> Iterator[Compute]:
        """Backward pass whose weight gradient does not wait."""
        yield from nth("backward_input", chunk)
        yield from nth("backward_weight", chunk)

    below = num_ranks - rank  # ranks from here to the turn of the V
    for _ in range(2 * below - 1):
        yield from nth("forward", down)
    for _ in range(rank):
        yield from nth("forward", up)
        yield from nth("forward", down)
    for _ in range(below):
        yield from nth("forward", up)
        yield from both(up)
    while count["forward", up] < cycles:
        if count["forward", down] < cycles:
            yield from nth("forward", down)
        yield from both(down)
        yield from nth("forward", up)
        yield from both(up)
    for _ in range(rank):
        yield from nth("backward_input", down)
        yield from nth("backward_input", up)
    for _ in range(below):
        yield from both(down)
    for chunk in (up, down):
        while count["backward_weight", chunk] < cycles:
            yield from nth("backward_weight", chunk)


# --- schedules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """An order of passes, where the stages have to be for it, and what it needs."""

    order: Callable[[int, int, int, int], Iterator[Compute]]
    placement: Placement = LOOP
    chunks: tuple[int, int | None] = (1, 1)
    """Fewest and most chunks per rank, None for any number."""
    whole_rounds: bool = False
    """Whether the micro-batches must be a multiple of the ranks."""

    def problem(self, num_ranks: int, num_micro_batches: int, num_chunks: int) -> str | None:
        """What is wrong with these sizes for the schedule, which "it" stands for; None if nothing is."""
        least, most = self.chunks
        if num_chunks < least or (most is not None and num_chunks > most):
            wanted = f"{least}" if least == most else f"{least} or more"
            return f"it needs {wanted} chunk{'s' * (wanted != '1')} per rank, not {num_chunks}"
        if self.whole_rounds and num_micro_batches % num_ranks:
            fix = f"use {nearest_multiples(num_micro_batches, num_ranks)}"
            return f"its micro-batches must be a multiple of the {num_ranks} ranks, not {num_micro_batches}; {fix}"
        return None

    def tables(self, num_ranks: int, num_micro_batches: int, num_chunks: int) -> list[Table]:
        """The table of every rank. Raises ValueError for sizes that ``problem`` finds fault with."""
        if found := self.problem(num_ranks, num_micro_batches, num_chunks):
            raise ValueError(found)
        return [list(self.order(rank, num_ranks, num_micro_batches, num_chunks)) for rank in range(num_ranks)]


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(one_forward_one_backward),
    "interleaved": Schedule(interleaved, chunks=(2, None), whole_rounds=True),
    "zb_h1": Schedule(zero_bubble_h1),
    "zb_v": Schedule(zero_bubble_v, placement=V, chunks=(2, 2)),
}
"""Training schedules by the ``kind`` of ``parallel.schedule``."""


def forward_only(num_ranks: int, num_micro_batches: int, num_chunks: int, placement: Placement = LOOP) -> list[Table]:
    """Evaluation: the table of every rank, every micro-batch forward through every chunk.

    Any number of micro-batches. Passes of equal length meet at ticks: a micro-batch moves on by one virtual stage per
    tick, and its followers are so far behind it that no rank is needed twice.
    """

    def tick(rank: int, compute: Compute) -> int:
        stage = placement.stage(rank, compute.chunk, num_ranks)
        if placement.shape == "v":  # the chunks of a rank are an odd number of stages apart
            return stage + num_chunks * compute.micro_batch
        group, place = divmod(compute.micro_batch, num_ranks)
        return stage + group * num_ranks * num_chunks + place

    passes = [
        Compute("forward", micro_batch, chunk)
        for micro_batch in range(num_micro_batches)
        for chunk in range(num_chunks)
    ]
    return [sorted(passes, key=lambda compute: tick(rank, compute)) for rank in range(num_ranks)]
