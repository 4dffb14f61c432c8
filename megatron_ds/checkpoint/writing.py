"""Writing: the files of a checkpoint, into a directory that has no name yet, each forced to the disk.

What a rank owns becomes shards whose headers describe them; documents and extra files are added; a manifest completes
the directory. To whom it belongs, and when it gets its name, is the business of the store that writes it.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from megatron_ds.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    list_names,
    plain_name,
    seal,
    sync_directory,
    write_sealed,
)
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import CONFIG, PIECES, PIECES_JSON, RANK_STATE, SHARD, TRAINER
from megatron_ds.errors import CheckpointError

MAX_FILE_BYTES = 4 << 30
"""Most that one shard takes, unless a single fragment is larger."""
MAX_PROBLEMS = 5
"""Damaged files that one message names."""


class Content(TypedDict):
    """What a checkpoint holds beside tensors of the model; all but the first counts on rank 0."""

    rank_state: dict[str, Tensor]
    """Random states of this rank."""
    trainer: dict
    """Counters of the run, as JSON."""
    config: dict
    """The resolved configuration, as JSON."""
    extra_files: NotRequired[dict[str, Path] | None]
    """Name in the checkpoint -> file or folder to copy."""


@dataclass(frozen=True)
class SaveReport:
    """A finished save: wall time in seconds on this rank, bytes of the whole checkpoint, its directory."""

    seconds: float
    bytes: int
    path: Path
    problems: tuple[str, ...] = ()
    """What went wrong without harm to the checkpoint, one line each."""


def write_share(
    directory: Path, rank: int, fragments: Iterable[Fragment], rank_state: dict[str, Tensor], max_file_bytes: int
) -> dict[str, FileEntry]:
    """Write a rank's shards and random states; their entries by name."""
    files = {}
    for part, batch in enumerate(_batches(fragments, max_file_bytes)):
        name = SHARD.format(rank=rank, part=part)
        files[name] = _write_shard(directory / name, batch)
    name = RANK_STATE.format(rank=rank)
    files[name] = _write_tensors(directory / name, rank_state)
    return files


def write_extras(
    directory: Path, documents: dict[str, bytes], extra_files: dict[str, Path] | None, taken: Iterable[str]
) -> dict[str, FileEntry]:
    """Write the documents and copy the extra files and folders into the checkpoint; their entries."""
    files = {name: write_sealed(directory / name, content) for name, content in documents.items()}
    for name, source in (extra_files or {}).items():
        parts = {f"{name}/{part}": source / part for part in list_names(source)} if source.is_dir() else {name: source}
        for part, origin in parts.items():
            target = directory / plain_name(part)
            if part in files or part in taken:
                raise ValueError(f"extra file {part!r} has the name of a checkpoint file")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, target)
            files[part] = seal(target)
    return files


def complete(directory: Path, manifest: Manifest) -> int:
    """Write the manifest, force all names to the disk and look at the files once more. Returns the bytes of all."""
    size = write_sealed(directory / MANIFEST, manifest.encode()).size
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync_directory(folder)
    require_whole(directory, manifest, manifest.files, hashes=False, listing=True)
    return size + sum(entry.size for entry in manifest.files.values())


def require_whole(path: Path, manifest: Manifest, names: Iterable[str], hashes: bool, listing: bool) -> None:
    """CheckpointError that names the bad files among ``names``; with ``listing`` also what should not be there."""
    problems = manifest.problems(path, names, hashes, progress=listing)
    problems += manifest.strangers(path) if listing else []
    if problems:
        raise CheckpointError(summary(problems))


def summary(problems: list[str]) -> str:
    """One line that names the first problems and counts the rest."""
    shown = problems[:MAX_PROBLEMS]
    more = [f"{len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "; ".join(shown + more)


def remove(path: Path) -> None:
    """Delete a directory with its content; of a link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove a checkpoint; first its name goes, so that one that is half removed is never taken for one."""
    leaving = path.with_name(f"{path.name}.tmp")
    remove(leaving)
    path.rename(leaving)
    remove(leaving)


def documents(content: Content) -> dict[str, bytes]:
    """What is written as JSON, by the names of the files."""
    trees = {TRAINER: content["trainer"], CONFIG: content["config"]}
    return {name: json.dumps(tree, indent=2).encode() for name, tree in trees.items()}


def _batches(fragments: Iterable[Fragment], limit: int) -> Iterator[list[Fragment]]:
    """Group fragments into files of at most ``limit`` bytes, or of one fragment.

    A batch is emptied after its turn, so that no more than one file's worth of values is alive.
    """
    batch, size = [], 0
    for fragment in fragments:
        if batch and size + fragment.tensor.nbytes > limit:
            yield batch
            batch.clear()
            size = 0
        batch.append(fragment)
        size += fragment.tensor.nbytes
    if batch:
        yield batch


def _write_shard(path: Path, batch: list[Fragment]) -> FileEntry:
    """Write fragments to one file whose header describes them."""
    tensors, pieces = {}, {}
    for fragment in batch:
        key = f"{fragment.kind}/{fragment.name}"
        if key in tensors:
            key = f"{key}#{len(tensors)}"
        tensors[key], pieces[key] = fragment.tensor, fragment.piece
    return _write_tensors(path, tensors, {PIECES: PIECES_JSON.dump_json(pieces).decode()})


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> FileEntry:
    """Write one safetensors file; only tensors on a device, or with gaps, are copied."""
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path, metadata)
    # safetensors creates files for the owner alone; give them the readers that the directory has
    path.chmod(path.parent.stat().st_mode & 0o666)
    return seal(path)
