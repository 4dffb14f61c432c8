"""Fetching: files that are on one node's disk and wanted on another's, sent from rank to rank.

A send and its receive wait for one another, so all ranks work through the same list in the same order, each doing what
concerns it: the first transfer that is not done has both its ranks waiting for it. Neighbours in the list that have no
rank in common run at the same time. A disk that fails does not break the rhythm: the bytes are sent, or received, all
the same, and what went wrong is told when the list is done.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.agreement import NodePeers
from megatron_ds.checkpoint.manifest import FileEntry
from megatron_ds.checkpoint.writing import summary
from megatron_ds.errors import CheckpointError

CHUNK_BYTES = 64 << 20
"""Most that one message carries."""

Nodes = tuple[tuple[int, ...], ...]
"""The ranks of every node."""


@dataclass(frozen=True)
class Transfer:
    """A file that rank ``source`` sends to rank ``target``."""

    name: str
    entry: FileEntry
    source: int
    target: int


def copies(nodes: Nodes, shares: list[dict[str, FileEntry]]) -> list[Transfer]:
    """Every rank's files (``shares``, by rank) to a rank of the next node.

    Even nodes first, then odd ones: nearly all of each half have no rank in common.
    """
    transfers = []
    for node in sorted(range(len(nodes)), key=lambda node: (node % 2, node)):
        following = nodes[(node + 1) % len(nodes)]
        for place, source in enumerate(nodes[node]):
            target = following[place % len(following)]
            transfers += [Transfer(name, entry, source, target) for name, entry in sorted(shares[source].items())]
    return transfers


def fetches(
    nodes: Nodes, holders: Mapping[str, set[int]], needs: list[set[str]], files: Mapping[str, FileEntry]
) -> list[Transfer]:
    """What each node lacks of what it needs (``needs``, by node), from one that holds it, spread over the ranks."""
    transfers = []
    for node, ranks in enumerate(nodes):
        for number, name in enumerate(sorted(name for name in needs[node] if node not in holders[name])):
            having = sorted(holders[name])
            sources = nodes[having[(node + number) % len(having)]]
            source, target = sources[number % len(sources)], ranks[number % len(ranks)]
            transfers.append(Transfer(name, files[name], source, target))
    return transfers


def carry_out(peers: NodePeers, transfers: Iterable[Transfer], origin: Path, destination: Path) -> None:
    """Send this rank's files from ``origin`` and receive what is for it into ``destination``, each file verified.

    Every rank calls it with the same transfers. CheckpointError, when all are done, on the ranks where one failed.
    """
    problems = []
    for transfer in transfers:
        problem = None
        if peers.rank == transfer.source:
            problem = _send(peers, transfer, origin / transfer.name)
        elif peers.rank == transfer.target:
            problem = _receive(peers, transfer, destination / transfer.name)
        if problem:
            problems.append(f"{transfer.name}: {problem}")
    if problems:
        raise CheckpointError(summary(problems))


def _send(peers: NodePeers, transfer: Transfer, path: Path) -> str | None:
    problem = None
    for start, size in _chunks(transfer.entry.size):
        byte_N = torch.zeros(size, dtype=torch.uint8)
        try:
            if not problem:
                _read(path, start, byte_N)
        except OSError as error:
            problem = str(error)
        peers.send(byte_N, transfer.target)
    return problem


def _receive(peers: NodePeers, transfer: Transfer, path: Path) -> str | None:
    problem, digest = None, hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except OSError as error:
        problem = str(error)
    for _, size in _chunks(transfer.entry.size):
        byte_N = peers.receive(size, transfer.source)
        digest.update(byte_N.numpy())
        try:
            if not problem:
                _append(path, byte_N)
        except OSError as error:
            problem = str(error)
    return problem or (None if digest.hexdigest() == transfer.entry.sha256 else "arrived with another sha256")


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    """Start and size of the messages that carry ``size`` bytes."""
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(CHUNK_BYTES, size - start)


def _read(path: Path, start: int, byte_N: Tensor) -> None:
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(byte_N.numpy()) < byte_N.numel():
            raise OSError("is shorter than it was")


def _append(path: Path, byte_N: Tensor) -> None:
    with path.open("ab") as file:
        file.write(byte_N.numpy())
        file.flush()
        os.fsync(file.fileno())
