"""Reading: whole tensors, or just what one rank needs, from however many pieces they were stored in.

The header of every shard says which piece each of its tensors is, so the index of a checkpoint is built from headers
alone; values are memory-mapped and only the pages that a request overlaps are read. A mapping lives no longer than
the copy of one block, since pages that were touched count as memory of the process until then: reading all of a model
takes no more than what the caller keeps. How the run was split when it wrote does not matter here. Whether the files
are intact does not either: ``store`` has settled that before.
"""

import json
import mmap
from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ds.checkpoint.manifest import Manifest
from megatron_ds.checkpoint.pieces import Box, Piece, covered, place, shared_runs, whole
from megatron_ds.errors import CheckpointError

SHARD, RANK_STATE = "shard_{rank:05d}_{part:03d}.safetensors", "rank_{rank:05d}.safetensors"
CONFIG, TRAINER = "config.json", "trainer.json"
MEAN = "ema"
"""Kind of the running mean of a weight."""
PIECES = "pieces"
"""Key of a shard's header metadata: JSON, tensor key -> Piece."""
PIECES_JSON = TypeAdapter(dict[str, Piece])
BLOCK_BYTES = 32 << 20
"""Most that is copied from a file before it is unmapped."""
AHEAD_BYTES = 1 << 20
"""Most that is asked for at once; Linux ignores what is beyond the largest request that the disk takes."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""By their names in a safetensors header."""


class WeightSource(Protocol):
    """Where a model's weights can be read from, whatever the format: what a run can begin with."""

    path: Path

    def shapes(self, kind: str = "weight") -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor of a kind, by logical name."""
        ...

    def read_range(self, name: str, kind: str, box: Box, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened ``box`` of a tensor: 1-D, on the CPU."""
        ...


@dataclass(frozen=True)
class Stored:
    """A piece and where its values are."""

    piece: Piece
    file: str
    offset: int
    """Of its first byte in the file."""
    dtype: torch.dtype


class Checkpoint:
    """One step on disk. ``rejected`` names, with the reason, the checkpoints that were passed over to find it.

    ``described`` is what the headers of all shards say, where somebody has read them already.
    """

    def __init__(self, path: Path, manifest: Manifest, described: Iterable[Stored] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.rejected: list[str] = []
        self._described = described

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.manifest.step

    @cached_property
    def config(self) -> dict:
        """The resolved run configuration."""
        return self._json(CONFIG)

    @cached_property
    def trainer(self) -> dict:
        """The trainer's own state: step, consumed samples, run id ..."""
        return self._json(TRAINER)

    def shapes(self, kind: str = "weight") -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor of a kind, by logical name."""
        return {name: stored[0].piece.shape for (name, its_kind), stored in self._index.items() if its_kind == kind}

    def kinds(self, name: str) -> list[str]:
        """What is stored for a logical name: "weight" and the optimizer's states."""
        return [kind for its_name, kind in self._index if its_name == name]

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """The whole tensor, on the CPU, in the shape and dtype it was stored in.

        CheckpointError when it is not there, a part is missing, or two pieces disagree on an element.
        """
        shape = self._stored(name, kind)[0].piece.shape
        return self.read_range(name, kind, whole(shape), 0, prod(shape)).view(shape)

    def read_range(self, name: str, kind: str, box: Box, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened ``box`` of a tensor: 1-D, on the CPU, in the stored dtype.

        Touches only pieces that overlap. CheckpointError as in ``read``; ValueError when the range is impossible.
        """
        stored = self._stored(name, kind)
        want = Piece(name, kind, stored[0].piece.shape, box, start, length)
        values = torch.empty(length, dtype=stored[0].dtype)
        block = BLOCK_BYTES // values.element_size()
        missing = sum(
            self._fill(part, replace(want, start=start + number * block, length=part.numel()), stored)
            for number, part in enumerate(values.split(block))
        )
        if missing:
            raise CheckpointError(f"{self.path}: {missing} of {length} wanted elements of {kind} of {name} are missing")
        return values

    def overlapping(self, name: str, kind: str, box: Box, start: int, length: int) -> set[str]:
        """The files that ``read_range`` would touch, from the headers alone; raises what that raises."""
        stored = self._stored(name, kind)
        want = Piece(name, kind, stored[0].piece.shape, box, start, length)
        return {one.file for one in stored if _may_overlap(want, one.piece)}

    def averaged(self) -> "Checkpoint":
        """The same with the running mean of every weight that has one in place of the weight.

        CheckpointError when it has none at all.
        """
        means = {name: stored for (name, kind), stored in self._index.items() if kind == MEAN}
        if not means:
            raise CheckpointError(f"{self.path}: has no running mean of its weights; train with --ema-decay")
        twin = copy(self)
        weights = {(name, "weight"): stored for name, stored in means.items()}
        twin.__dict__["_index"] = {key: weights.get(key, stored) for key, stored in self._index.items()}
        return twin

    def rank_state(self, rank: int) -> dict[str, Tensor] | None:
        """Random states of a rank by their names; None when the run that wrote had no such rank."""
        name = RANK_STATE.format(rank=rank)
        if name not in self.manifest.files:
            return None
        with self._open(name) as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a dict)

    def check_pieces(self) -> None:
        """Raise CheckpointError unless every header is readable and every tensor has all its elements."""
        for (name, kind), stored in self._index.items():
            shape, held = stored[0].piece.shape, covered([one.piece for one in stored])
            if len({(one.piece.shape, one.dtype) for one in stored}) > 1:
                raise CheckpointError(f"{self.path}: the pieces of {kind} of {name} differ in full shape or dtype")
            if held < prod(shape):
                raise CheckpointError(
                    f"{self.path}: {prod(shape) - held} of {prod(shape)} elements of {kind} of {name} are missing"
                )

    def describe(self, files: Iterable[str]) -> list[Stored]:
        """What the headers of the shards among ``files`` say that they hold; CheckpointError if one is unreadable."""
        return [stored for file in sorted(files) if file.startswith("shard_") for stored in self._pieces(file)]

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[Stored]]:
        index = defaultdict(list)
        for stored in self.describe(self.manifest.files) if self._described is None else self._described:
            index[stored.piece.name, stored.piece.kind].append(stored)
        return dict(index)

    def _pieces(self, file: str) -> list[Stored]:
        """What a shard's header says that it holds."""
        offsets = _offsets(self.path / file)  # first, as this reads no more than the header
        with self._open(file) as shard:
            try:
                pieces = PIECES_JSON.validate_json(shard.metadata()[PIECES])
                slices = {key: shard.get_slice(key) for key in pieces}
                fits = all(slices[key].get_shape() == [piece.length] for key, piece in pieces.items())
                # Not that of an empty slice: it would read the page where the values begin, and all that is ahead.
                dtypes = {key: DTYPES[values.get_dtype()] for key, values in slices.items()}
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"{self.path / file}: unreadable piece descriptions ({error})") from error
        if not fits:
            raise CheckpointError(f"{self.path / file}: a piece description has another length than its tensor")
        return [Stored(piece, file, offsets[key], dtypes[key]) for key, piece in pieces.items()]

    def _stored(self, name: str, kind: str) -> list[Stored]:
        if (name, kind) not in self._index:
            known = self.kinds(name)
            hint = f"it has {', '.join(known)}" if known else "no tensor has that name"
            raise CheckpointError(f"{self.path}: no {kind} of {name}; {hint}")
        return self._index[name, kind]

    def _fill(self, values: Tensor, want: Piece, stored: list[Stored]) -> int:
        """Copy what the pieces hold of ``want`` into ``values``; how many elements none of them holds."""
        filled = torch.zeros(want.length, dtype=torch.bool)
        for source in stored:
            if _may_overlap(want, source.piece) and not place(
                values, filled, want, self._map(source, want), source.piece
            ):
                place_of = f"{self.path / source.file}: {want.kind} of {want.name}"
                raise CheckpointError(f"{place_of} contradicts another piece of it")
        return want.length - int(torch.count_nonzero(filled))

    def _map(self, stored: Stored, want: Piece) -> Tensor:
        """The piece's values, 1-D: pages are given back with the tensor; those that ``want`` shares are being read.

        Asking for them by range makes the disk read just these: a page that is touched before would bring everything
        around it along, as far as the system reads ahead (up to megabytes).
        """
        before = stored.offset % mmap.ALLOCATIONGRANULARITY
        size = before + stored.piece.length * stored.dtype.itemsize
        path = self.path / stored.file
        try:
            with path.open("rb") as file:
                # A private copy, of which nothing is ever written: torch wants a buffer that it could write to.
                pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=stored.offset - before)
            for first, count in shared_runs(want, stored.piece):
                begin, end = (before + element * stored.dtype.itemsize for element in (first, first + count))
                for start in range(begin - begin % mmap.PAGESIZE, end, AHEAD_BYTES):
                    pages.madvise(mmap.MADV_WILLNEED, start, min(AHEAD_BYTES, end - start))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: unreadable ({error})") from error
        return torch.frombuffer(pages, dtype=stored.dtype, count=stored.piece.length, offset=before)

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / name}: unreadable ({error})") from error

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name}: unreadable ({error})") from error


def _offsets(path: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor begins, which ``safe_open`` does not tell; nothing is read ahead."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            pages.madvise(mmap.MADV_RANDOM)
            begin = 8 + int.from_bytes(pages[:8], "little")
            header = json.loads(pages[8:begin])
        return {key: begin + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error


def _may_overlap(want: Piece, have: Piece) -> bool:
    """Whether the two can share an element; exact when they are ranges of the same box."""
    if want.box == have.box:
        return max(want.start, have.start) < min(want.start + want.length, have.start + have.length)
    within = all(max(a_lo, b_lo) < min(a_hi, b_hi) for (a_lo, a_hi), (b_lo, b_hi) in zip(want.box, have.box))
    return within and want.length > 0 and have.length > 0
