"""Run order tables on a clock, without processes: makespan, bubble and peak activations of every rank.

The simulator checks what a schedule claims. It knows the data dependencies and the durations, not the network;
transfers take no time.
"""

from dataclasses import dataclass

from megatron_ds.pipeline.lowering import ScheduleError
from megatron_ds.pipeline.schedule import Pass, Table, dependencies


@dataclass(frozen=True)
class Simulation:
    """What happened on the clock."""

    makespan: float
    """Time from the first start to the last end, in the unit of the durations."""
    bubble: list[float]
    """Idle share of the makespan, per rank."""
    peak_activations: list[int]
    """Most chunk activations alive at once, per rank."""
    spans: list[list[tuple[float, float]]]
    """(start, end) of every compute, in table order, per rank."""


def simulate(tables: list[Table], num_chunks: int = 1, *, forward: float = 1.0, backward: float = 2.0) -> Simulation:
    """Simulate with the given durations of one chunk's passes.

    Raises:
        ScheduleError: the tables deadlock.
    """
    num_ranks = len(tables)
    num_stages = num_ranks * num_chunks
    duration = {"forward": forward, "backward": backward}
    end: dict[Pass, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in tables]

    while any(len(spans[rank]) < len(table) for rank, table in enumerate(tables)):
        progress = False
        for rank, table in enumerate(tables):
            while len(spans[rank]) < len(table):
                compute = table[len(spans[rank])]
                stage = compute.chunk * num_ranks + rank
                needs = dependencies(compute.kind, stage, compute.micro_batch, num_stages)
                if not all(need in end for need in needs):
                    break
                free = spans[rank][-1][1] if spans[rank] else 0.0
                start = max([free, *(end[need] for need in needs)])
                finish = start + duration[compute.kind]
                spans[rank].append((start, finish))
                end[compute.kind, stage, compute.micro_batch] = finish
                progress = True
        if not progress:
            raise ScheduleError("schedule deadlock")

    makespan = max(span[-1][1] for span in spans if span)
    busy = [sum(finish - start for start, finish in span) for span in spans]
    return Simulation(makespan, [1 - time / makespan for time in busy], [_peak(table) for table in tables], spans)


def _peak(table: Table) -> int:
    alive = peak = 0
    for compute in table:
        alive += 1 if compute.kind == "forward" else -1
        peak = max(peak, alive)
    return peak
