"""The store: write a checkpoint so that it is there whole or not at all, and find the newest whole one.

All ranks write into ``global_step{N}.tmp``, force every file to the disk and agree that all of them succeeded; only
then does rank 0 list the files in the manifest and rename the directory. A crash at any moment leaves the checkpoints
before it, and at most a temporary directory that the next save removes. Whatever fails on one rank (a full disk) is
raised on all of them. Finding shares the hashing over the ranks and ends in the same choice everywhere.
Ranks meet through ``Peers``; what to save and when is the trainer's business.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_ds.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    list_names,
    plain_name,
    replace_file,
    seal,
    sync_directory,
    write_sealed,
)
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import CONFIG, PIECES, PIECES_JSON, RANK_STATE, SHARD, TRAINER, Checkpoint
from megatron_ds.errors import CheckpointError

T = TypeVar("T")

STEP_DIRECTORY = re.compile(r"global_step(0|[1-9]\d*)(\.old)?")
LATEST, LATEST_MEGATRON = "latest", "latest_checkpointed_iteration.txt"
MAX_PROBLEMS = 5
"""Damaged files that one message names."""
_FAILURES = (OSError, SafetensorError, RuntimeError, ValueError, MemoryError, CheckpointError)
"""What may go wrong on one rank alone: the disk, a file, a copy from the device, memory, a wrong fragment."""


class Peers(Protocol):
    """The ranks that share a checkpoint."""

    rank: int
    world_size: int

    def gather_objects(self, value: Any) -> list[Any]:
        """Meet all ranks: every one gets every rank's value, in rank order."""
        ...


class SingleProcess:
    """Peers of a process that is alone: export, generation, inspection."""

    rank = 0
    world_size = 1

    def gather_objects(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]


@dataclass(frozen=True)
class SaveReport:
    """A finished save: wall time in seconds on this rank, bytes of the whole checkpoint, its directory."""

    seconds: float
    bytes: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run in ``directory``, which all ranks must see. Every method is called by every rank."""

    def __init__(self, directory: Path, peers: Peers, max_file_bytes: int = 4 << 30) -> None:
        self.directory = Path(directory)
        self.peers = peers
        self.max_file_bytes = max_file_bytes

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        rank_state: dict[str, Tensor],
        trainer: dict,
        config: dict,
        extra_files: dict[str, Path] | None = None,
    ) -> SaveReport:
        """Write ``global_step{step}``, replacing one that exists.

        ``fragments`` and ``rank_state`` are this rank's; producing them must not need another rank, which may have
        failed already. ``trainer``, ``config`` (both JSON) and ``extra_files`` (name in the checkpoint -> file or
        folder to copy) count on rank 0. CheckpointError on every rank when any rank fails; earlier checkpoints stay
        as they were and nothing is left behind. A replaced step survives until its successor is in place.
        """
        began = time.monotonic()
        final = self.directory / f"global_step{step}"
        temporary = self.directory / f"{final.name}.tmp"
        documents = {TRAINER: _json(trainer), CONFIG: _json(config)}
        action = f"saving {final} failed"

        def commit(files: dict[str, FileEntry]) -> int:
            files |= _write_extras(temporary, documents, extra_files or {}, taken=files)
            manifest = Manifest(step=step, world_size=self.peers.world_size, files=files)
            size = self._complete(temporary, manifest)
            self._publish(step, temporary, final)
            return size

        try:
            on_rank_0(self.peers, action, lambda: self._prepare(temporary))
            share = _agree(self.peers, action, lambda: self._write_share(temporary, fragments, rank_state))
            files = {name: entry for share in self.peers.gather_objects(share) for name, entry in share.items()}
            size = on_rank_0(self.peers, action, lambda: commit(files))
        except CheckpointError as error:
            if self.peers.rank == 0:
                with suppress(OSError):
                    self._clean()
            raise CheckpointError(f"{error}; earlier checkpoints are untouched") from error
        return SaveReport(time.monotonic() - began, size, final)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank; None when there is none at all.

        Every file of a candidate is hashed, shared over the ranks. A step beyond the one in ``latest`` belongs to a
        branch that was left (or to a save that did not finish) and comes last. What was passed over is named, with
        the reason, in the result's ``rejected``. CheckpointError when there are checkpoints but none is whole.
        """
        return _newest(self.directory, self.peers, verify=True)

    def left_at(self) -> int | None:
        """The step that ``latest`` names when later ones are there: the user went back to it. Otherwise None."""

        def find() -> int | None:
            latest = _latest_step(self.directory)
            return int(latest) if any(step > latest for step, _ in _candidates(self.directory)) else None

        return on_rank_0(self.peers, f"cannot list {self.directory}", find)

    def _prepare(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clean()
        temporary.mkdir()

    def _clean(self) -> None:
        """Remove what an interrupted save left; a step it had set aside and not yet replaced comes back."""
        for leftover in self.directory.glob("global_step*.tmp"):
            remove(leftover)
        for aside in self.directory.glob("global_step*.old"):
            final = aside.with_suffix("")
            if final.exists():
                remove(aside)
            else:
                aside.rename(final)

    def _write_share(
        self, directory: Path, fragments: Iterable[Fragment], rank_state: dict[str, Tensor]
    ) -> dict[str, FileEntry]:
        """Write this rank's shards and random states; their entries by name."""
        rank, files = self.peers.rank, {}
        for part, batch in enumerate(_batches(fragments, self.max_file_bytes)):
            name = SHARD.format(rank=rank, part=part)
            files[name] = _write_shard(directory / name, batch)
        name = RANK_STATE.format(rank=rank)
        files[name] = _write_tensors(directory / name, rank_state)
        return files

    def _complete(self, directory: Path, manifest: Manifest) -> int:
        """Write the manifest and look at the whole once more, from here. Returns the checkpoint's bytes."""
        size = write_sealed(directory / MANIFEST, manifest.encode()).size
        for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
            sync_directory(folder)
        _require_whole(directory, manifest, manifest.files, hashes=False, listing=True)
        Checkpoint(directory, manifest).check_pieces()
        return size + sum(entry.size for entry in manifest.files.values())

    def _publish(self, step: int, temporary: Path, final: Path) -> None:
        """Give the finished directory its name, and only then point to it."""
        aside = final.with_name(f"{final.name}.old")
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        sync_directory(self.directory)
        with suppress(OSError):  # what stays is removed, or named, by the next save
            remove(aside)
        replace_file(self.directory / LATEST, final.name.encode())
        replace_file(self.directory / LATEST_MEGATRON, str(step).encode())


def open_checkpoint(path: Path, verify: bool = True, peers: Peers | None = None) -> Checkpoint:
    """Open a step directory, or the newest whole checkpoint of a save directory.

    Without ``verify`` files are checked by presence and size only. Several ranks that open the same path pass
    ``peers``, share the hashing and agree. CheckpointError, naming place and damage, when there is nothing whole.
    """
    path, peers = Path(path), peers or SingleProcess()
    if STEP_DIRECTORY.fullmatch(path.name) or (path / MANIFEST).exists():
        return _open_step(path, peers, verify)
    checkpoint = _newest(path, peers, verify)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no global_step* directory; give a save directory or one of its steps")
    return checkpoint


def _newest(directory: Path, peers: Peers, verify: bool) -> Checkpoint | None:
    action = f"cannot list {directory}"
    limit, candidates = on_rank_0(peers, action, lambda: (_latest_step(directory), _candidates(directory)))
    beyond = [
        f"{directory / name}: beyond step {limit}, which {directory / LATEST} names"
        for step, name in candidates
        if step > limit
    ]
    damaged = []
    for step, name in sorted(candidates, key=lambda found: (found[0] > limit, -found[0], found[1])):
        try:
            checkpoint = _open_step(directory / name, peers, verify)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            checkpoint.rejected = damaged + (beyond if step <= limit else [])
            return checkpoint
    if damaged:
        raise CheckpointError(
            f"{directory}: no checkpoint is whole; move them away to start anew: {'; '.join(damaged)}"
        )
    return None


def _candidates(directory: Path) -> list[tuple[int, str]]:
    """Step and name of every step directory, those included that an interrupted replacement had set aside."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return [(int(match[1]), match[0]) for match in map(STEP_DIRECTORY.fullmatch, names) if match]


def _latest_step(directory: Path) -> float:
    """The step that ``latest`` names, whether it is there or not; infinity when the file says nothing."""
    path = directory / LATEST
    text = path.read_text(errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    match = STEP_DIRECTORY.fullmatch(text)
    return int(match[1]) if match else math.inf


def _open_step(path: Path, peers: Peers, verify: bool) -> Checkpoint:
    """Check one step, file i by rank i % world; the same Checkpoint or CheckpointError on every rank."""

    def check_files() -> Manifest:
        if path.is_symlink():
            raise CheckpointError("symbolic links are refused; give the directory itself")
        manifest = Manifest.read(path)
        share = sorted(manifest.files)[peers.rank :: peers.world_size]
        _require_whole(path, manifest, share, hashes=verify, listing=peers.rank == 0)
        return manifest

    def check_pieces() -> Checkpoint:
        checkpoint = Checkpoint(path, manifest)
        checkpoint.check_pieces()
        return checkpoint

    action = f"cannot use {path}"
    manifest = _agree(peers, action, check_files)
    if len(set(peers.gather_objects(manifest.sha256))) > 1:
        raise CheckpointError(f"{action}: it is not the same on all ranks; they must share one directory")
    return _agree(peers, action, check_pieces)


def _require_whole(path: Path, manifest: Manifest, names: Iterable[str], hashes: bool, listing: bool) -> None:
    """CheckpointError that names the bad files among ``names``; with ``listing`` also what should not be there."""
    problems = manifest.problems(path, names, hashes, progress=listing)
    problems += manifest.strangers(path) if listing else []
    if problems:
        shown = problems[:MAX_PROBLEMS]
        more = [f"{len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise CheckpointError("; ".join(shown + more))


def on_rank_0(peers: Peers, action: str, work: Callable[[], T]) -> T:
    """Let rank 0 work and the others wait; its result, or its error, everywhere."""
    result = _agree(peers, action, work if peers.rank == 0 else lambda: None)
    return peers.gather_objects(result)[0]


def _agree(peers: Peers, action: str, work: Callable[[], T]) -> T:
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


def _write_extras(
    directory: Path, documents: dict[str, bytes], extra_files: dict[str, Path], taken: Iterable[str]
) -> dict[str, FileEntry]:
    """Write the documents and copy the extra files and folders into the checkpoint; their entries."""
    files = {name: write_sealed(directory / name, content) for name, content in documents.items()}
    for name, source in extra_files.items():
        parts = {f"{name}/{part}": source / part for part in list_names(source)} if source.is_dir() else {name: source}
        for part, origin in parts.items():
            target = directory / plain_name(part)
            if part in files or part in taken:
                raise ValueError(f"extra file {part!r} has the name of a checkpoint file")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, target)
            files[part] = seal(target)
    return files


def remove(path: Path) -> None:
    """Delete a directory with its content; of a link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=2).encode()
