"""Agreement: ranks that work apart, meet, and go on with the same verdict.

A checkpoint has many writers, and whatever fails on one of them must stop all. So work is done in ``agree``: whoever
fails says so at the meeting that follows, and every rank raises the same CheckpointError. The ranks themselves are
known only by the protocols here, which process groups fulfil, and so do threads.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from megatron_ds.errors import CheckpointError

T = TypeVar("T")

_FAILURES = (OSError, SafetensorError, RuntimeError, ValueError, MemoryError, CheckpointError)
"""What may go wrong on one rank alone: the disk, a file, a copy from the device, memory, a wrong fragment."""


class Peers(Protocol):
    """The ranks that share a checkpoint."""

    rank: int
    world_size: int

    def gather_objects(self, value: Any) -> list[Any]:
        """Meet all ranks: every one gets every rank's value, in rank order."""
        ...


class NodePeers(Peers, Protocol):
    """Ranks that know who shares a node with them, and can send bytes to one another."""

    nodes: tuple[tuple[int, ...], ...]
    """The ranks of every node, nodes and ranks in ascending order."""
    node: int
    node_ranks: tuple[int, ...]
    """The ranks of this rank's node; the first of them is its leader."""

    def send(self, byte_N: Tensor, to: int) -> None:
        """Send uint8 values of the main memory to a rank that receives as many."""
        ...

    def receive(self, size: int, source: int) -> Tensor:
        """``size`` uint8 values from a rank."""
        ...


class SingleProcess:
    """Peers of a process that is alone: export, generation, inspection."""

    rank = 0
    world_size = 1

    def gather_objects(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]


def agree(peers: Peers, action: str, work: Callable[[], T]) -> T:
    """Work on every rank, then meet: each rank its own result, or the same CheckpointError on all."""
    result, cause, message = None, None, None
    try:
        result = work()
    except _FAILURES as error:
        cause, message = error, str(error) or repr(error)
    failures: dict[str, list[int]] = {}
    for rank, failure in enumerate(peers.gather_objects(message)):
        if failure:
            failures.setdefault(failure, []).append(rank)
    if failures:
        lines = [
            f"{failure} (rank {', '.join(map(str, ranks))})" if len(ranks) < peers.world_size else failure
            for failure, ranks in failures.items()
        ]
        raise CheckpointError(f"{action}: {'; '.join(lines)}") from cause
    return result


def on_rank_0(peers: Peers, action: str, work: Callable[[], T]) -> T:
    """Let rank 0 work and the others wait; its result, or its error, everywhere."""
    result = agree(peers, action, work if peers.rank == 0 else lambda: None)
    return peers.gather_objects(result)[0]


def on_leaders(peers: NodePeers, action: str, work: Callable[[], T]) -> list[T]:
    """Let one rank of each node work and the others wait; their results in node order, or their errors, everywhere."""
    result = agree(peers, action, work if peers.rank == peers.node_ranks[0] else lambda: None)
    results = peers.gather_objects(result)
    return [results[ranks[0]] for ranks in peers.nodes]
