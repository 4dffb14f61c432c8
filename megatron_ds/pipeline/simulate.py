"""Run order tables on a clock, without processes: makespan, bubble and peak activations of every rank.

The simulator checks what a schedule claims. It knows the data dependencies and the durations, and of the network only
how long a message between two ranks is under way; messages do not delay each other.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.pipeline.lowering import ScheduleError
from megatron_ds.pipeline.schedule import LOOP, Compute, Pass, Placement, Table, dependencies, global_kind


@dataclass(frozen=True)
class Durations:
    """Time of one pass through one chunk, in any unit; a backward pass in one piece takes the sum of its halves."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    latency: float = 0.0
    """From the end of a pass to the arrival of its output on another rank."""

    @property
    def backward(self) -> float:
        """A whole backward pass."""
        return self.backward_input + self.backward_weight

    def per_chunk(self, num_chunks: int) -> "Durations":
        """The same for chunks, when these are the times of a rank's whole stage."""
        return Durations(
            self.forward / num_chunks, self.backward_input / num_chunks, self.backward_weight / num_chunks, self.latency
        )


class Span(NamedTuple):
    """One pass when it ran, simulated or measured."""

    rank: int
    compute: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What happened on the clock."""

    makespan: float
    """Time from the first start to the last end, in the unit of the durations."""
    bubble: list[float]
    """Idle share of the makespan, per rank."""
    peak_activations: list[float]
    """Most activations alive at once, per rank, in those of a whole stage (all chunks of the rank): each lives from its
    forward pass to the end of its backward pass, including the weights' part."""
    spans: list[Span]
    """Every pass, rank by rank, in the order of its table."""

    @property
    def mean_bubble(self) -> float:
        """Idle share over all ranks."""
        return sum(self.bubble) / len(self.bubble)


def simulate(
    tables: list[Table], num_chunks: int = 1, placement: Placement = LOOP, durations: Durations = Durations()
) -> Simulation:
    """Simulate with the given durations of one chunk's passes.

    Raises:
        ScheduleError: the tables deadlock.
    """
    num_ranks = len(tables)
    end: dict[Pass, float] = {}
    spans: list[list[Span]] = [[] for _ in tables]

    def arrival(rank: int, need: Pass) -> float:
        here = placement.rank_and_chunk(need[1], num_ranks)[0] == rank
        return end[need] + (0.0 if here else durations.latency)

    while any(len(spans[rank]) < len(table) for rank, table in enumerate(tables)):
        progress = False
        for rank, table in enumerate(tables):
            while len(spans[rank]) < len(table):
                compute = table[len(spans[rank])]
                stage = placement.stage(rank, compute.chunk, num_ranks)
                needs = dependencies(compute.kind, stage, compute.micro_batch, num_ranks * num_chunks)
                if not all(need in end for need in needs):
                    break
                free = spans[rank][-1].end if spans[rank] else 0.0
                start = max([free, *(arrival(rank, need) for need in needs)])
                finish = start + getattr(durations, compute.kind)
                spans[rank].append(Span(rank, compute, start, finish))
                end[global_kind(compute.kind), stage, compute.micro_batch] = finish
                progress = True
        if not progress:
            raise ScheduleError("schedule deadlock")

    makespan = max(own[-1].end for own in spans if own)
    busy = [sum(span.end - span.start for span in own) for own in spans]
    return Simulation(
        makespan=makespan,
        bubble=[1 - time / makespan for time in busy],
        peak_activations=[_peak(table) / num_chunks for table in tables],
        spans=[span for own in spans for span in own],
    )


def _peak(table: Table) -> int:
    """Most chunk activations alive at once."""
    change = {"forward": 1, "backward": -1, "backward_input": 0, "backward_weight": -1}
    alive = peak = 0
    for compute in table:
        alive += change[compute.kind]
        peak = max(peak, alive)
    return peak
