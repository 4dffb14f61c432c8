"""Weights to safetensors files, one tensor in memory at a time.

A shard's header needs only names and shapes, so it is written first and the tensors follow, each read whole from the
checkpoint, cut to the true vocabulary, cast once from fp32 and let go. No model is built, and the largest tensor
bounds the memory. The layout is the one that ``safe_open`` and every engine read; which tensors go in, and under which
names, is the caller's plan.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ds.errors import CheckpointError
from megatron_ds.hf.options import FORMATS, Format


@dataclass(frozen=True)
class Entry:
    """One tensor of the export: its name in the file, its name in the checkpoint and its shape in the file."""

    name: str
    source: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def plan_shards(entries: list[Entry], itemsize: int, max_shard_size: int) -> list[list[Entry]]:
    """Cut the entries, in order, into shards of at most ``max_shard_size`` bytes; a larger tensor has its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        num_bytes = entry.numel * itemsize
        if shards[-1] and size + num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += num_bytes
    return shards


def write_weights(
    directory: Path, entries: list[Entry], read: Callable[[str], Tensor], precision: str, max_shard_size: int
) -> None:
    """Write all entries to ``directory``: model.safetensors, or shards with model.safetensors.index.json.

    ``read(source)`` returns the whole fp32 tensor of the checkpoint; rows beyond ``entry.shape[0]`` (the vocabulary's
    padding) are left out. ``precision`` is a key of FORMATS. Raises CheckpointError for a weight that is not finite,
    or that does not fit the precision.
    """
    target = FORMATS[precision]
    shards = plan_shards(entries, target.itemsize, max_shard_size)
    total_size = sum(entry.numel for entry in entries) * target.itemsize
    weight_map = {}
    with tqdm(total=total_size, unit="B", unit_scale=True, desc="weights", disable=None) as progress:
        for number, shard in enumerate(shards, start=1):
            sharded = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file_name = sharded if len(shards) > 1 else "model.safetensors"
            weight_map |= {entry.name: file_name for entry in shard}
            with (directory / file_name).open("wb") as file:
                file.write(_header(shard, target))
                for entry in shard:
                    _write_tensor(file, entry, read(entry.source), precision)
                    progress.update(entry.numel * target.itemsize)
    if len(shards) > 1:
        metadata = {"total_size": total_size, "total_parameters": sum(entry.numel for entry in entries)}
        write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file the way transformers does: indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _header(shard: list[Entry], target: Format) -> bytes:
    """safetensors header: its length as a little-endian u64, then JSON padded with blanks to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        end = offset + entry.numel * target.itemsize
        header[entry.name] = {"dtype": target.tag, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, entry: Entry, tensor: Tensor, precision: str) -> None:
    values = tensor[: entry.shape[0]].to(getattr(torch, FORMATS[precision].name)).contiguous()
    assert tuple(values.shape) == entry.shape, f"{entry.source}: {tuple(values.shape)} read, {entry.shape} planned"
    if not torch.isfinite(values).all():
        fits = "export with --dtype bf16 or fp32" if torch.isfinite(tensor).all() else "use an earlier checkpoint"
        raise CheckpointError(f"{entry.source}: holds values that are not finite in {precision}; {fits}")
    file.write(values.view(torch.uint8).numpy().data)
