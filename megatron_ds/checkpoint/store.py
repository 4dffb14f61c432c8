"""The store: write a checkpoint so that it is there whole or not at all, and find the newest whole one.

All ranks write into ``global_step{N}.tmp``, force every file to the disk and agree that all of them succeeded; only
then does rank 0 list the files in the manifest and rename the directory. A crash at any moment leaves the checkpoints
before it, and at most a temporary directory that the next save removes. Whatever fails on one rank (a full disk) is
raised on all of them. Finding shares the hashing over the ranks and ends in the same choice everywhere.
Ranks meet through ``Peers``; what to save and when is the trainer's business.
"""

import math
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from megatron_ds.checkpoint.agreement import Peers, SingleProcess, agree, on_rank_0
from megatron_ds.checkpoint.manifest import MANIFEST, FileEntry, Manifest, replace_file, sync_directory
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.writing import (
    MAX_FILE_BYTES,
    Content,
    SaveReport,
    complete,
    documents,
    remove,
    require_whole,
    write_extras,
    write_share,
)
from megatron_ds.errors import CheckpointError

STEP_DIRECTORY = re.compile(r"global_step(0|[1-9]\d*)(\.old)?")
LATEST, LATEST_MEGATRON = "latest", "latest_checkpointed_iteration.txt"


class CheckpointStore:
    """The checkpoints of one run in ``directory``, which all ranks must see. Every method is called by every rank."""

    def __init__(self, directory: Path, peers: Peers, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.directory = Path(directory)
        self.peers = peers
        self.max_file_bytes = max_file_bytes

    def save(self, step: int, fragments: Iterable[Fragment], **content: Unpack[Content]) -> SaveReport:
        """Write ``global_step{step}``, replacing one that exists.

        ``fragments`` are this rank's; producing them must not need another rank, which may have failed already.
        CheckpointError on every rank when any rank fails; earlier checkpoints stay as they were and nothing is left
        behind. A replaced step survives until its successor is in place.
        """
        began = time.monotonic()
        final = self.directory / f"global_step{step}"
        temporary = self.directory / f"{final.name}.tmp"
        action = f"saving {final} failed"

        def write() -> dict[str, FileEntry]:
            return write_share(temporary, self.peers.rank, fragments, content["rank_state"], self.max_file_bytes)

        def commit(files: dict[str, FileEntry]) -> int:
            files |= write_extras(temporary, documents(content), content.get("extra_files"), taken=files)
            manifest = Manifest(step=step, world_size=self.peers.world_size, files=files)
            size = complete(temporary, manifest)
            Checkpoint(temporary, manifest).check_pieces()
            self._publish(step, temporary, final)
            return size

        try:
            on_rank_0(self.peers, action, lambda: self._prepare(temporary))
            share = agree(self.peers, action, write)
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
        named = STEP_DIRECTORY.fullmatch(path.name)
        if named and int(named[1]) != manifest.step:
            raise CheckpointError(f"{MANIFEST}: is of step {manifest.step}; give the directory its name back")
        share = sorted(manifest.files)[peers.rank :: peers.world_size]
        require_whole(path, manifest, share, hashes=verify, listing=peers.rank == 0)
        return manifest

    def check_pieces() -> Checkpoint:
        checkpoint = Checkpoint(path, manifest)
        checkpoint.check_pieces()
        return checkpoint

    action = f"cannot use {path}"
    manifest = agree(peers, action, check_files)
    if len(set(peers.gather_objects(manifest.sha256))) > 1:
        raise CheckpointError(f"{action}: it is not the same on all ranks; they must share one directory")
    return agree(peers, action, check_pieces)
