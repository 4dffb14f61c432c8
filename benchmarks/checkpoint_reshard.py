"""What a rank reads from the disk when the layout changes: part C of ``checkpoint.py``.

A transformer's matrices, cut by rows and by columns over tensor ranks and each part evenly over ZeRO ranks, are written
by one layout and read by others. What a rank needs are the bytes of its own part, and the headers count as not needed.
What it reads is counted by the system where it asks the disk: whole pages, and whatever is read ahead. The files are
dropped from memory before each rank, as if it were alone on its node; its neighbours would find in memory what it read.
The files are opened without hashing them, which reads all of them, once per run.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import torch
from checkpoint_work import bytes_read, forget
from tqdm import tqdm

from megatron_ds.checkpoint.pieces import Fragment, Piece, volume
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint

HIDDEN, FFN, VOCABULARY = 2048, 4096, 8192
KINDS = ("weight", "exp_avg", "exp_avg_sq")
WRITTEN_BY = (4, 2)
"""Tensor ranks, and ZeRO ranks of each."""
READ_BY = ((4, 2), (2, 4), (1, 8), (4, 3), (8, 1))
AT_MOST = 1.1


def tensors(hidden: int, ffn: int, vocabulary: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Name -> shape, and the dimension that tensor parallelism cuts."""
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
    step = directory / "global_step0"
    for layout in tqdm(READ_BY, desc="C reshard", disable=None, leave=False):
        needed, headers, read = 0, 0, 0
        for pieces in parts(layout, shapes):
            forget(step)
            before = bytes_read()
            checkpoint = open_checkpoint(step, verify=False)
            headers += bytes_read() - before
            forget(step)
            before = bytes_read()
            for piece in pieces:
                values = checkpoint.read_range(piece.name, piece.kind, piece.box, piece.start, piece.length)
                needed += values.nbytes
            read += bytes_read() - before
        if not headers:
            print(f"SKIPPED part C: {directory} is not on a disk")
            return
        (tensor, zero), (tp, dp) = WRITTEN_BY, layout
        label = f"C tp {tensor} x dp {zero} read by tp {tp} x dp {dp}"
        report.add(f"{label}: read / needed", "ratio", read / needed, at_most=AT_MOST)
        report.add(f"{label}: headers / needed", "ratio", headers / needed)


def write(directory: Path, shapes: dict[str, tuple[tuple[int, ...], int | None]]) -> None:
    """The checkpoint, by ranks that are threads."""
    size = WRITTEN_BY[0] * WRITTEN_BY[1]
    barrier, slots = threading.Barrier(size), [None] * size

    def save(rank: int, pieces: list[Piece]) -> None:
        # The same on all tensor ranks where a tensor is not cut: they all hold it.
        fragments = (
            Fragment(piece.name, piece.kind, piece.shape, piece.box, piece.start, torch.ones(piece.length))
            for piece in pieces
        )
        store = CheckpointStore(directory, ThreadPeers(rank, barrier, slots))
        store.save(0, fragments, rank_state={}, trainer={}, config={})

    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(save, *rank) for rank in enumerate(parts(WRITTEN_BY, shapes))]:
            done.result()


def parts(layout: tuple[int, int], shapes: dict[str, tuple[tuple[int, ...], int | None]]) -> Iterator[list[Piece]]:
    """What each rank of a layout holds."""
    tensor_ranks, zero_ranks = layout
    for tensor in range(tensor_ranks):
        boxes = {
            name: tuple(
                (size * tensor // tensor_ranks, size * (tensor + 1) // tensor_ranks) if dim == cut else (0, size)
                for dim, size in enumerate(shape)
            )
            for name, (shape, cut) in shapes.items()
        }
        for zero in range(zero_ranks):
            ranges = {
                name: (volume(box) * zero // zero_ranks, volume(box) * (zero + 1) // zero_ranks)
                for name, box in boxes.items()
            }
            yield [
                Piece(name, kind, shape, boxes[name], ranges[name][0], ranges[name][1] - ranges[name][0])
                for name, (shape, _) in shapes.items()
                for kind in KINDS
            ]


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
