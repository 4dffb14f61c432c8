"""What a rank reads from the disk when the layout changes: part C of ``checkpoint.py``.

A transformer's matrices, cut by rows and by columns over tensor ranks and each part evenly over ZeRO ranks, are written
by one layout and read by others. A rank needs the bytes of its own part, and none of the headers. What is read is
counted by the system where it asks the disk: whole pages, and whatever is read ahead. Tensor ranks share a node, so one
finds in memory what another has read, and files are dropped from memory before each node. *Alone* drops them before
each rank; where columns are cut finer than before, its share of a row is then less than the pages that hold it.
The files are opened without hashing them, which reads each of them once more, on one of all ranks.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
from checkpoint_work import bytes_read, forget
from tqdm import tqdm

from megatron_ds.checkpoint.pieces import Fragment, Piece, volume
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint

HIDDEN, FFN, VOCABULARY = 2048, 4096, 8192
Shapes = dict[str, tuple[tuple[int, ...], int | None]]
"""Name -> shape, and the dimension that tensor parallelism cuts."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
WRITTEN_BY = (4, 2)
"""Tensor ranks, and ZeRO ranks of each."""
READ_BY = ((4, 2), (2, 4), (1, 8), (4, 3), (8, 1))
AT_MOST = 1.1


def tensors(hidden: int, ffn: int, vocabulary: int) -> Shapes:
    """Those of a layer."""
    return {
        "embedding": ((vocabulary, hidden), 0),
        "qkv": ((3 * hidden, hidden), 0),
        "attention_output": ((hidden, hidden), 1),
        "ffn_up": ((ffn, hidden), 0),
        "ffn_down": ((hidden, ffn), 1),
        "attention_norm": ((hidden,), None),
        "ffn_norm": ((hidden,), None),
    }


def compare_layouts(report: harness.Report, directory: Path, scale: int = 1) -> None:
    """Part C; ``scale`` divides all sizes."""
    shapes = tensors(HIDDEN // scale, FFN // scale, VOCABULARY // scale)
    write(directory, shapes)
    for layout in tqdm(READ_BY, desc="C layouts", disable=None, leave=False):
        ranks = list(parts(layout, shapes))
        label = f"C tp {WRITTEN_BY[0]} x dp {WRITTEN_BY[1]} read by tp {layout[0]} x dp {layout[1]}: read / needed"
        ratio = read_per_needed(directory / "global_step0", ranks, per_node=layout[0])
        if not ratio:
            print(f"SKIPPED part C: {directory} is not on a disk")
            return
        report.add(label, "ratio", ratio, at_most=AT_MOST)
        if layout[0] > 1:
            report.add(f"{label}, alone", "ratio", read_per_needed(directory / "global_step0", ranks, per_node=1))


def read_per_needed(step: Path, ranks: list[list[Piece]], per_node: int) -> float:
    """Bytes read from the disk by bytes needed, over all ranks; ``per_node`` of them after another share a memory."""
    needed, before = 0, bytes_read()
    for rank, pieces in enumerate(ranks):
        if rank % per_node == 0:
            forget(step)
        checkpoint = open_checkpoint(step, verify=False)
        for piece in pieces:
            needed += checkpoint.read_range(piece.name, piece.kind, piece.box, piece.start, piece.length).nbytes
    return (bytes_read() - before) / needed


def write(directory: Path, shapes: Shapes) -> None:
    """The checkpoint, by ranks that are threads."""
    size = WRITTEN_BY[0] * WRITTEN_BY[1]
    barrier, slots = threading.Barrier(size), [None] * size

    def save(rank: int, pieces: list[Piece]) -> None:
        # All values are equal, so that tensor ranks agree on what none of them cuts.
        fragments = (
            Fragment(piece.name, piece.kind, piece.shape, piece.box, piece.start, torch.ones(piece.length))
            for piece in pieces
        )
        store = CheckpointStore(directory, ThreadPeers(rank, barrier, slots))
        store.save(0, fragments, rank_state={}, trainer={}, config={})

    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(save, *rank) for rank in enumerate(parts(WRITTEN_BY, shapes))]:
            done.result()


def parts(layout: tuple[int, int], shapes: Shapes) -> Iterator[list[Piece]]:
    """What each rank of a layout holds, tensor ranks side by side."""
    tensor_ranks, zero_ranks = layout
    for zero, tensor in product(range(zero_ranks), range(tensor_ranks)):
        pieces = []
        for name, (shape, cut) in shapes.items():
            box = tuple(
                (size * tensor // tensor_ranks, size * (tensor + 1) // tensor_ranks) if dim == cut else (0, size)
                for dim, size in enumerate(shape)
            )
            start, end = (volume(box) * edge // zero_ranks for edge in (zero, zero + 1))
            pieces += [Piece(name, kind, shape, box, start, end - start) for kind in KINDS]
        yield pieces


class ThreadPeers:
    """Ranks that are threads of one process and meet at a barrier."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size, self._barrier, self._slots = rank, barrier.parties, barrier, slots

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values
