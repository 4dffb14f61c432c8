"""From order tables to instructions: computes with the sends and receives they need.

All ranks' tables are walked together in one global order, and each transfer is written into both peers' programs at the
moment its producer is scheduled. So the transfers between any two ranks have the same order on both sides: pairs cannot
mismatch, and with first-in-first-out channels nothing can deadlock. Receives are then posted one compute earlier, which
changes no order, so that a message can travel while its receiver computes. A table whose dependencies can never be met
is refused here, before any process starts.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ds.pipeline.schedule import LOOP, Compute, Pass, Placement, Table, dependencies, global_kind


@dataclass(frozen=True)
class Transfer:
    """One message of one micro-batch: an activation to the next virtual stage or a gradient to the previous one."""

    kind: Literal[
        "send_activation", "recv_activation", "hand_activation", "send_gradient", "recv_gradient", "hand_gradient"
    ]
    """Sent, received, or handed to another chunk of the same rank."""
    micro_batch: int
    chunk: int
    """Of the rank whose program this is in; the giving one if both are here."""
    peer: int
    """Pipeline rank at the other end."""
    peer_chunk: int


Instruction = Compute | Transfer


class ScheduleError(AssertionError):
    """The tables wait for each other forever, or leave a micro-batch unfinished."""


def lower(tables: list[Table], num_chunks: int = 1, placement: Placement = LOOP) -> list[list[Instruction]]:
    """Programs of all ranks.

    Args:
        tables: one order table per pipeline rank.
        num_chunks: model chunks per rank.
        placement: where the virtual stages are.

    Raises:
        ScheduleError: some compute's input is never produced.
    """
    num_ranks = len(tables)
    num_stages = num_ranks * num_chunks
    programs: list[list[Instruction]] = [[] for _ in tables]
    position = [0] * num_ranks
    done: set[Pass] = set()

    def transfer(what: str, rank: int, compute: Compute, to_stage: int) -> None:
        """Write the message that ``compute`` on ``rank`` produces into the programs of both ends."""
        target, to_chunk = placement.rank_and_chunk(to_stage, num_ranks)
        number, chunk = compute.micro_batch, compute.chunk
        if target == rank:
            programs[rank].append(Transfer(f"hand_{what}", number, chunk, rank, to_chunk))
            return
        programs[rank].append(Transfer(f"send_{what}", number, chunk, target, to_chunk))
        programs[target].append(Transfer(f"recv_{what}", number, to_chunk, rank, chunk))

    while any(position[rank] < len(table) for rank, table in enumerate(tables)):
        progress = False
        for rank, table in enumerate(tables):
            if position[rank] == len(table):
                continue
            compute = table[position[rank]]
            stage = placement.stage(rank, compute.chunk, num_ranks)
            if not done.issuperset(dependencies(compute.kind, stage, compute.micro_batch, num_stages)):
                continue
            progress = True
            position[rank] += 1
            kind = global_kind(compute.kind)
            done.add((kind, stage, compute.micro_batch))
            programs[rank].append(compute)
            if kind == "forward" and stage < num_stages - 1:
                transfer("activation", rank, compute, stage + 1)
            if kind == "backward" and stage > 0:
                transfer("gradient", rank, compute, stage - 1)
        if not progress:
            waiting = {rank: table[position[rank]] for rank, table in enumerate(tables) if position[rank] < len(table)}
            raise ScheduleError(f"schedule deadlock, every rank waits: {waiting}")
    return [_post_early(program) for program in programs]


def _post_early(program: list[Instruction]) -> list[Instruction]:
    """The program with every receive moved before the compute that precedes it."""
    posted: list[Instruction] = []
    before_last_compute = 0
    for instruction in program:
        if isinstance(instruction, Transfer) and instruction.kind.startswith("recv"):
            posted.insert(before_last_compute, instruction)
            before_last_compute += 1
            continue
        if isinstance(instruction, Compute):
            before_last_compute = len(posted)
        posted.append(instruction)
    return posted
