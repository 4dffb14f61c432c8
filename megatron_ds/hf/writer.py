"""Weights to safetensors files, a part of one tensor in memory at a time.

A shard's header needs only names and shapes, so it is written first and the tensors follow, part by part: each is read
from the checkpoint, cast once from fp32 and let go. No model is built, and no tensor is ever whole in memory. The
layout is the one that ``safe_open`` and every engine read; which tensors go in, and under which names, is in
``plan.py``.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ds.checkpoint.pieces import Box, volume
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.options import FORMATS
from megatron_ds.hf.plan import Entry

MAX_PART = 16 << 20
"""Elements of a tensor that are in memory at a time."""


def plan_shards(entries: list[Entry], max_shard_size: int) -> list[list[Entry]]:
    """Cut the entries, in order, into shards of at most ``max_shard_size`` bytes; a larger tensor has its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_weights(
    directory: Path, entries: list[Entry], read: Callable[[str, Box], Tensor], max_shard_size: int
) -> None:
    """Write all entries to ``directory``: model.safetensors, or shards with model.safetensors.index.json.

    ``read(source, box)`` returns the fp32 values of a part of a tensor, flattened. Raises CheckpointError for a weight
    that is not finite, or that does not fit the precision.
    """
    shards = plan_shards(entries, max_shard_size)
    total_size = sum(entry.num_bytes for entry in entries)
    weight_map = {}
    with tqdm(total=total_size, unit="B", unit_scale=True, desc="weights", disable=None) as progress:
        for number, shard in enumerate(shards, start=1):
            sharded = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file_name = sharded if len(shards) > 1 else "model.safetensors"
            weight_map |= {entry.name: file_name for entry in shard}
            with (directory / file_name).open("wb") as file:
                file.write(_header(shard))
                for entry in shard:
                    assert volume(entry.box) == entry.numel, f"{entry.name}: {entry.box} for the shape {entry.shape}"
                    for part in _parts(entry.box):
                        progress.update(file.write(_values(entry, part, read)))
    if len(shards) > 1:
        metadata = {"total_size": total_size, "total_parameters": sum(entry.numel for entry in entries)}
        write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file the way transformers does: indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _header(shard: list[Entry]) -> bytes:
    """safetensors header: its length as a little-endian u64, then JSON padded with blanks to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.format.tag, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parts(box: Box) -> Iterator[Box]:
    """Cut a box into boxes of at most MAX_PART elements, in the row-major order of these."""
    if volume(box) <= MAX_PART:
        yield box
        return
    axis = next(axis for axis, (lo, hi) in enumerate(box) if hi - lo > 1)
    (lo, hi), step = box[axis], max(1, MAX_PART // volume(box[axis + 1 :]))
    for first in range(lo, hi, step):
        yield from _parts((*box[:axis], (first, min(first + step, hi)), *box[axis + 1 :]))


def _values(entry: Entry, part: Box, read: Callable[[str, Box], Tensor]) -> memoryview:
    """The bytes of one part of a tensor."""
    exact = torch.zeros(volume(part)) if entry.source is None else read(entry.source, part)
    values = exact.to(getattr(torch, FORMATS[entry.rounding].name)).to(getattr(torch, entry.format.name))
    assert values.numel() == volume(part), f"{entry.name}: {values.numel()} values for the box {part}"
    if not torch.isfinite(values).all():
        fits = "export with --dtype bf16 or fp32" if torch.isfinite(exact).all() else "use an earlier checkpoint"
        raise CheckpointError(f"{entry.source}: holds values that are not finite in {entry.rounding}; {fits}")
    return values.view(torch.uint8).numpy().data
