"""From order tables to instructions: computes with the sends and receives they need.

All ranks' tables are walked together in one global order, and each transfer is written into both peers' programs at the
moment its producer is scheduled. So the transfers between any two ranks have the same order on both sides: pairs cannot
mismatch, and with first-in-first-out channels nothing can deadlock. A table whose dependencies can never be met is
refused here, before any process starts.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ds.pipeline.schedule import Compute, Pass, Table, dependencies


@dataclass(frozen=True)
class Transfer:
    """One message of one micro-batch: an activation to the next virtual stage or a gradient to the previous one."""

    kind: Literal["send_activation", "recv_activation", "send_gradient", "recv_gradient"]
    micro_batch: int
    chunk: int
    peer: int
    """Pipeline rank at the other end."""


Instruction = Compute | Transfer


class ScheduleError(AssertionError):
    """The tables wait for each other forever, or leave a micro-batch unfinished."""


def lower(tables: list[Table], num_chunks: int = 1) -> list[list[Instruction]]:
    """Programs of all ranks.

    Args:
        tables: one order table per pipeline rank.
        num_chunks: model chunks per rank.

    Raises:
        ScheduleError: some compute's input is never produced.
    """
    num_ranks = len(tables)
    num_stages = num_ranks * num_chunks
    programs: list[list[Instruction]] = [[] for _ in tables]
    position = [0] * num_ranks
    done: set[Pass] = set()

    def transfer(what: str, source: int, stage: int, target_stage: int, micro_batch: int) -> None:
        """Write the message from ``stage`` on rank ``source`` to ``target_stage`` into both programs."""
        chunk, target = divmod(target_stage, num_ranks)
        programs[source].append(Transfer(f"send_{what}", micro_batch, stage // num_ranks, target))
        programs[target].append(Transfer(f"recv_{what}", micro_batch, chunk, source))

    while any(position[rank] < len(table) for rank, table in enumerate(tables)):
        progress = False
        for rank, table in enumerate(tables):
            if position[rank] == len(table):
                continue
            compute = table[position[rank]]
            stage = compute.chunk * num_ranks + rank
            if not done.issuperset(dependencies(compute.kind, stage, compute.micro_batch, num_stages)):
                continue
            progress = True
            position[rank] += 1
            done.add((compute.kind, stage, compute.micro_batch))
            programs[rank].append(compute)
            if compute.kind == "forward" and stage < num_stages - 1:
                transfer("activation", rank, stage, stage + 1, compute.micro_batch)
            if compute.kind == "backward" and stage > 0:
                transfer("gradient", rank, stage, stage - 1, compute.micro_batch)
        if not progress:
            waiting = {rank: table[position[rank]] for rank, table in enumerate(tables) if position[rank] < len(table)}
            raise ScheduleError(f"schedule deadlock, every rank waits: {waiting}")
    return programs
