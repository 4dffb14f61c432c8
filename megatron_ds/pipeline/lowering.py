"""From order tables to instructions: computes with the sends and receives they need.

All ranks' tables are walked together in rounds. In a round every rank whose next compute has its inputs, from earlier
rounds, does that one; what is produced is written into the programs of both ends at once: the sends of a round after
its compute, the receives before it, so that a message travels while its receiver computes.

Why nothing can deadlock: a message goes down (to a later rank) or up. Order the messages of each direction by round
and, within a round, by sender: ascending for those that go down, descending for those that go up. Every program has
its share in this order, since a rank sends once per round, and last. So one first-in-first-out channel per direction
is enough, activations and gradients alike, even one that handles a single message of a rank at a time (as an NCCL
communicator does), as long as sends are awaited at the end only.

A table whose dependencies can never be met is refused here, before any process starts.
"""

from collections.abc import Iterator
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

    def received_from(self, rank: int) -> "Transfer":
        """The other end of a message that ``rank`` sends."""
        kind = "recv_activation" if self.kind == "send_activation" else "recv_gradient"
        return Transfer(kind, self.micro_batch, self.peer_chunk, rank, self.chunk)


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
    programs: list[list[Instruction]] = [[] for _ in tables]
    for computes in _rounds(tables, num_chunks, placement):
        sent: dict[int, Transfer] = {}
        for rank, compute in computes.items():
            if message := _message(rank, compute, len(tables), num_chunks, placement):
                sent[rank] = message
        down = [rank for rank, message in sent.items() if message.peer > rank]
        up = [rank for rank, message in reversed(sent.items()) if message.peer < rank]
        for rank in (*down, *up):
            programs[sent[rank].peer].append(sent[rank].received_from(rank))
        for rank, compute in computes.items():
            programs[rank].append(compute)
            if rank in sent:
                programs[rank].append(sent[rank])
    return programs


def _rounds(tables: list[Table], num_chunks: int, placement: Placement) -> Iterator[dict[int, Compute]]:
    """What the ranks do in each round, by rank in ascending order."""
    num_ranks = len(tables)
    position = [0] * num_ranks
    done: set[Pass] = set()

    def stage_of(rank: int, compute: Compute) -> int:
        return placement.stage(rank, compute.chunk, num_ranks)

    while waiting := {rank: table[position[rank]] for rank, table in enumerate(tables) if position[rank] < len(table)}:
        ready = {
            rank: compute
            for rank, compute in waiting.items()
            if done.issuperset(
                dependencies(compute.kind, stage_of(rank, compute), compute.micro_batch, num_ranks * num_chunks)
            )
        }
        if not ready:
            raise ScheduleError(f"schedule deadlock, every rank waits: {waiting}")
        for rank, compute in ready.items():
            position[rank] += 1
            done.add((global_kind(compute.kind), stage_of(rank, compute), compute.micro_batch))
        yield ready


def _message(rank: int, compute: Compute, num_ranks: int, num_chunks: int, placement: Placement) -> Transfer | None:
    """What a rank sends, or hands to another of its chunks, after a compute."""
    stage = placement.stage(rank, compute.chunk, num_ranks)
    kind = global_kind(compute.kind)
    if kind == "forward" and stage < num_ranks * num_chunks - 1:
        what, to_stage = "activation", stage + 1
    elif kind == "backward" and stage > 0:
        what, to_stage = "gradient", stage - 1
    else:
        return None
    peer, peer_chunk = placement.rank_and_chunk(to_stage, num_ranks)
    verb = "hand" if peer == rank else "send"
    return Transfer(f"{verb}_{what}", compute.micro_batch, compute.chunk, peer, peer_chunk)
