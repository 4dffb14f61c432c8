"""Peers: all ranks once more, for work beside training.

Messages of one group must be sent in the same order on all ranks, so a thread that works in the background needs a
group that nobody else uses. It moves bytes of the main memory, so the group is gloo's, whatever the device. Who shares
a node matters to such work, as ranks of one node see the same disk.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class NodePeers:
    """This rank's way to the others; one thread at a time may use it, the same one's turn on every rank."""

    rank: int
    nodes: tuple[tuple[int, ...], ...]
    """The ranks of every node, nodes and ranks in ascending order."""
    group: dist.ProcessGroup

    @classmethod
    def build(cls, ranks_per_node: int | None = None) -> "NodePeers":
        """Make the group; collective over the world.

        ``ranks_per_node``: neighbours that count as a node; by default those that one launcher started.
        """
        rank = dist.get_rank()
        first = rank - rank % ranks_per_node if ranks_per_node else rank - int(os.environ.get("LOCAL_RANK", rank))
        firsts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(firsts, first)
        nodes = tuple(
            tuple(peer for peer, its_first in enumerate(firsts) if its_first == node) for node in sorted(set(firsts))
        )
        return cls(rank, nodes, dist.new_group(backend="gloo"))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.nodes))

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return self.node_of(self.rank)

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """The ranks of this rank's node; the first of them is its leader."""
        return self.nodes[self.node]

    def node_of(self, rank: int) -> int:
        """Index of a rank's node."""
        return next(node for node, ranks in enumerate(self.nodes) if rank in ranks)

    def gather_objects(self, value: Any) -> list[Any]:
        """Meet all ranks: every one gets every rank's value, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def send(self, byte_N: Tensor, to: int) -> None:
        """Send uint8 values of the main memory to a rank that receives as many."""
        if byte_N.numel():
            dist.send(byte_N, to, group=self.group)

    def receive(self, size: int, source: int) -> Tensor:
        """``size`` uint8 values from a rank."""
        byte_N = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.recv(byte_N, source, group=self.group)
        return byte_N
