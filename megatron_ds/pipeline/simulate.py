"""Run order tables on a clock, without processes: makespan, bubble and peak activations of every rank.

The simulator checks what a schedule claims. It knows the data dependencies and the durations, and of the network only
how long a message between two ranks is under way; messages do not delay each other.
"""

from dataclasses import dataclass

from megatron_ds.pipeline.lowering import ScheduleError
from megatron_ds.pipeline.schedule import LOOP, Pass, Placement, Table, dependencies, global_kind


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


@dataclass(frozen=True)
class Simulation:
    """What happened on the clock."""

    makespan: float
    """Time from the first start to the last end, in the unit of the durations."""
    bubble: list[float]
    """Idle share of the makespan, per rank."""
    peak_activations: list[int]
    """Most chunk activations alive at once, per rank: from the forward pass to the end of the (weight's) backward."""
    spans: list[list[tuple[float, float]]]
    """(start, end) of every compute, in table order, per rank."""


def simulate(
    tables: list[Table], num_chunks: int = 1, placement: Placement = LOOP, durations: Durations = Durations()
) -> Simulation:
    """Simulate with the given durations of one chunk's passes.

    Raises:
        ScheduleError: the tables deadlock.
    """
    num_ranks = len(tables)
    num_stages = num_ranks * num_chunks
    end: dict[Pass, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in tables]

    def arrival(rank: int, need: Pass) -> float:
        here = placement.rank_and_chunk(need[1], num_ranks)[0] == rank
        return end[need] + (0.0 if here else durations.latency)

    while any(len(spans[rank]) < len(table) for rank, table in enumerate(tables)):
        progress = False
        for rank, table in enumerate(tables):
            while len(spans[rank]) < len(table):
                compute = table[len(spans[rank])]
                stage = placement.stage(rank, compute.chunk, num_ranks)
                needs = dependencies(compute.kind, stage, compute.micro_batch, num_stages)
                if not all(need in end for need in needs):
                    break
                free = spans[rank][-1][1] if spans[rank] else 0.0
                start = max([free, *(arrival(rank, need) for need in needs)])
                finish = start + getattr(durations, compute.kind)
                spans[rank].append((start, finish))
                end[global_kind(compute.kind), stage, compute.micro_batch] = finish
                progress = True
        if not progress:
            raise ScheduleError("schedule deadlock")

    makespan = max(span[-1][1] for span in spans if span)
    busy = [sum(finish - start for start, finish in span) for span in spans]
    return Simulation(makespan, [1 - time / makespan for time in busy], [_peak(table) for table in tables], spans)


def _peak(table: Table) -> int:
    change = {"forward": 1, "backward": -1, "backward_input": 0, "backward_weight": -1}
    alive = peak = 0
    for compute in table:
        alive += change[compute.kind]
        peak = max(peak, alive)
    return peak
