"""The tensors of a Hugging Face directory, by their names in its files, to be read in parts.

Headers say where every tensor lies. A part of one is a handful of contiguous runs, and each is read from its place into
the memory that the caller gets: nothing else is touched, and nothing is mapped that would count as memory. FP8 weights
come with a factor for every block; only the blocks that a part overlaps are multiplied. What the names mean is said in
``plan.py``.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ds.checkpoint.pieces import Box, contiguous_runs, sizes, volume
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.pickles import read_pickled_tensors

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""The weights in one file; split ones have an index of that name with ``.index.json``."""
DEEPSPEED, DEEPSPEED_NEXT = "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Number formats that are read, by their names in safetensors."""
FLOAT8 = torch.float8_e4m3fn
SCALE = "_scale_inv"
"""What follows the name of an FP8 weight in that of its blocks' factors."""
MAX_NAMED = 3
"""Names that one message has."""
PLAIN = "only plain files inside the directory are read; copy what lies elsewhere into it"


class StoredTensor(Protocol):
    """One tensor of a directory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, view: tuple[int, ...], box: Box) -> Tensor:
        """The elements of ``box`` of the tensor in the shape ``view``, flattened, on the CPU."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """Values that begin at byte ``offset`` of a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, view: tuple[int, ...], box: Box) -> Tensor:
        """See ``StoredTensor``; CheckpointError when the file ends too early."""
        values = torch.empty(volume(box), dtype=self.dtype)
        left = values.view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                for first, count in contiguous_runs(view, box):
                    file.seek(self.offset + first * self.dtype.itemsize)
                    end = len(left) - count * self.dtype.itemsize
                    while len(left) > end:
                        got = file.readinto(left[: len(left) - end])
                        if not got:
                            raise CheckpointError(f"{self.file}: has become shorter than its header says")
                        left = left[got:]
        except OSError as error:
            raise CheckpointError(f"{self.file}: unreadable ({error})") from error
        return values


@dataclass(frozen=True)
class LoadedTensor:
    """Values that are in memory, or mapped."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Number format."""
        return self.tensor.dtype

    def read(self, view: tuple[int, ...], box: Box) -> Tensor:
        """See ``StoredTensor``."""
        return self.tensor.reshape(view)[tuple(slice(*side) for side in box)].flatten()


@dataclass(frozen=True)
class ScaledTensor:
    """An FP8 matrix whose blocks each have a factor."""

    values: StoredTensor
    factors: StoredTensor
    block: tuple[int, int]
    """Rows and columns of a whole block; those at the edges may be smaller."""
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.values.shape

    def read(self, view: tuple[int, ...], box: Box) -> Tensor:
        """See ``StoredTensor``; ``view`` may put dimensions of size 1 before rows and columns."""
        assert view[-2:] == self.shape, f"{self.shape} is not to be seen as {view}"
        blocks = tuple((lo // size, -(-hi // size)) for (lo, hi), size in zip(box[-2:], self.block))
        grid = self.factors.read(self.factors.shape, blocks).float().view(sizes(blocks))
        for dim, ((lo, hi), (first, _), size) in enumerate(zip(box[-2:], blocks, self.block)):
            grid = grid.repeat_interleave(size, dim).narrow(dim, lo - first * size, hi - lo)
        return self.values.read(view, box).float().mul_(grid.flatten())


def open_tensors(directory: Path, block: tuple[int, int] | None = None) -> dict[str, StoredTensor]:
    """Everything that the directory holds, by name; of FP8 weights the product with their factors.

    Args:
        directory: has safetensors, one or several with an index; or else pickled tensors.
        block: rows and columns of a block of FP8 weights.

    Raises CheckpointError for weights that are missing, damaged or of another format, and for names in an index that
    could lead out of the directory: those before anything is opened.
    """
    if _has(directory, SAFETENSORS):
        stored = _read_all(directory, SAFETENSORS, _safetensors)
    else:
        name = next((name for name in (PICKLED, DEEPSPEED) if _has(directory, name)), None) or _only_pickle(directory)
        stored = _read_all(directory, name, _pickled)
    return _with_factors(directory, stored, block)


def first_few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f"; and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return "; ".join(names[:MAX_NAMED]) + more


def _has(directory: Path, name: str) -> bool:
    return (directory / name).exists() or (directory / f"{name}.index.json").exists()


def _only_pickle(directory: Path) -> str:
    """The name of the one file of pickled tensors; CheckpointError when there is none, or another one, too."""
    names = sorted(path.name for path in directory.glob("*") if path.suffix in (".pt", ".pth", ".bin"))
    if len(names) != 1:
        found = f"several files of weights ({first_few(names)})" if names else "no weights"
        raise CheckpointError(f"{directory}: has {found}; it needs {SAFETENSORS}, or {SAFETENSORS}.index.json")
    return names[0]


def _read_all(directory: Path, name: str, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of one file, or those that an index places in several."""
    if (directory / name).exists():
        return read(_plain_file(directory, name, name))
    index = directory / f"{name}.index.json"
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: _plain_file(directory, file, index.name) for file in sorted(set(places.values()))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: unreadable ({error!r})") from error
    if absent := [file for file, path in files.items() if not path.is_file()]:
        raise CheckpointError(f"{directory}: shards are missing: {first_few(absent)}; download them again")
    opened = {file: read(path) for file, path in files.items()}
    if absent := [key for key, file in places.items() if key not in opened[file]]:
        raise CheckpointError(f"{index}: tensors are not in their shards: {first_few(absent)}; download them again")
    return {key: opened[file][key] for key, file in places.items()}


def _plain_file(directory: Path, name: str, origin: str) -> Path:
    """A file of the directory; CheckpointError when the name, or a link of that name, leads out of it."""
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{directory / origin}: names the file {name!r}; {PLAIN}")
    path = directory / name
    if path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path}: is a link to {path.resolve()}; {PLAIN}")
    return path


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, whose header the library has found to fit its size."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); download it again") from error
    header.pop("__metadata__", None)
    other = [f"{name} is {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in DTYPES]
    if other:
        raise CheckpointError(f"{path}: {first_few(other)}; only {', '.join(DTYPES)} can be read")
    return {
        name: FileTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }


def _pickled(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one pickle; CheckpointError also when it is one of several parts of a model."""
    if path.name == DEEPSPEED and path.with_name(DEEPSPEED_NEXT).exists():
        raise CheckpointError(f"{path}: holds one tensor-parallel part of the model; export it whole to Hugging Face")
    tensors = read_pickled_tensors(path)
    other = [f"{name} is {value.dtype}" for name, value in tensors.items() if value.dtype not in DTYPES.values()]
    if other:
        raise CheckpointError(f"{path}: {first_few(other)}; only {', '.join(DTYPES)} can be read")
    return {name: LoadedTensor(tensor) for name, tensor in tensors.items()}


def _with_factors(
    directory: Path, stored: dict[str, StoredTensor], block: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    """FP8 tensors joined with their factors; CheckpointError for one without, or with too many or too few."""
    joined = dict(stored)
    for name, values in stored.items():
        if values.dtype != FLOAT8:
            continue
        factors = joined.pop(name + SCALE, None)
        if block is None or factors is None:
            absent = "config.json has no quantization_config" if block is None else f"there is no {name}{SCALE}"
            raise CheckpointError(f"{directory}: {name} is FP8, but {absent}")
        expected = tuple(-(-size // side) for size, side in zip(values.shape, block))
        if len(values.shape) != 2 or factors.shape != expected:
            shapes = f"{name} is {list(values.shape)} and {name}{SCALE} {list(factors.shape)}"
            raise CheckpointError(f"{directory}: {shapes}; blocks of {list(block)} have {list(expected)} factors")
        joined[name] = ScaledTensor(values, factors, block)
    return joined
