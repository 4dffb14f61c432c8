"""The manifest: which files make a checkpoint, with the size and the SHA-256 of each.

A checkpoint is whole when its directory holds exactly the files that ``manifest.json`` lists, byte for byte, and no
folder without any; permissions and times are not part of it, since copying changes them. The manifest guards itself:
its bytes are a function of its content, digest included, so reading it means writing it again and comparing. Names are
checked before anything is opened, only regular files are, and nothing follows a symbolic link inside. Nothing here
knows tensors or ranks.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from megatron_ds.errors import CheckpointError

MANIFEST = "manifest.json"


def plain_name(name: str) -> str:
    """Return a file name relative to the checkpoint, with "/" between folders; ValueError if it could lead outside."""
    path = PurePosixPath(name)
    if not name or str(path) != name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain relative file name")
    if name in (MANIFEST, "."):
        raise ValueError(f"{name!r} cannot name a listed file")
    return name


class FileEntry(BaseModel):
    """One file: its size in bytes and its SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class NodePart(BaseModel):
    """Which part of a checkpoint a directory holds when every node keeps its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    save: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Drawn for each save, the same in all its parts."""
    sequence: Annotated[int, Field(gt=0)]
    """How many saves there were before it, and one; the same in all its parts."""
    node: Annotated[int, Field(ge=0)]
    """Index of the node that wrote this part."""
    nodes: Annotated[int, Field(gt=0)]
    """How many parts there are."""


class Manifest(BaseModel):
    """What a checkpoint, or a node's part of one, consists of.

    ``files`` maps plain names to entries; ``world_size`` ranks wrote them, those of other parts included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["megatron_ds checkpoint"] = "megatron_ds checkpoint"
    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(gt=0)]
    files: dict[Annotated[str, AfterValidator(plain_name)], FileEntry]
    part: NodePart | None = None

    @property
    def sha256(self) -> str:
        """Digest of everything the manifest says."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def encode(self) -> bytes:
        """The only bytes that a manifest of this content can have."""
        return _canonical({**self._content(), "sha256": self.sha256})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read ``manifest.json``; CheckpointError when it is missing or not, byte for byte, as it was written."""
        path = directory / MANIFEST
        try:
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode):
                what = "symbolic links are refused" if stat.S_ISLNK(mode) else "is not a regular file"
                raise CheckpointError(f"{MANIFEST}: {what}")
            written = path.read_bytes()
            content = json.loads(written)
            if isinstance(content, dict):
                content.pop("sha256", None)
            manifest = cls.model_validate(content)
        except FileNotFoundError:
            raise CheckpointError(f"{MANIFEST}: missing; no checkpoint of megatron_ds, or not a finished one") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "content"
            raise CheckpointError(f"{MANIFEST}: {place} = {first['input']!r:.60}: {first['msg']}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{MANIFEST}: unreadable ({error!r})") from error
        if manifest.encode() != written:
            raise CheckpointError(f"{MANIFEST}: its own sha256 differs")
        return manifest

    def problems(self, directory: Path, names: Iterable[str], hashes: bool, progress: bool = False) -> list[str]:
        """Check the listed files ``names`` in ``directory``: one line per file that is not as it was written.

        Sizes always, SHA-256 only with ``hashes``. ``progress`` shows a bar on a terminal when it takes seconds.
        """
        names = sorted(names)
        total = sum(self.files[name].size for name in names)
        bar = tqdm(total=total, desc=f"verify {directory.name}", unit="B", unit_scale=True, delay=2, leave=False,
                   disable=None if progress else True)  # fmt: skip
        lines = []
        with bar:
            for name in names:
                problem = self._problem(directory, name, hashes)
                if problem:
                    lines.append(f"{name}: {problem}")
                bar.update(self.files[name].size)
        return lines

    def strangers(self, directory: Path) -> list[str]:
        """One line per file, link or folder in ``directory`` that the manifest does not list."""
        listed = {MANIFEST, *self.files, *(f"{folder}/" for name in self.files for folder in _folders(name))}
        lines = []
        for name in sorted(set(_walk(directory)) - listed):
            link = (directory / name).is_symlink()
            lines.append(f"{name}: {'is a symbolic link' if link else 'not in the manifest'}")
        return lines

    def _content(self) -> dict:
        return self.model_dump(exclude_none=True)  # a manifest that names no part is what it was without such a field

    def _problem(self, directory: Path, name: str, hashes: bool) -> str | None:
        entry, path = self.files[name], directory / name
        try:
            if any((directory / folder).is_symlink() for folder in _folders(name)):
                return "lies behind a symbolic link"
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return "is not a regular file"
            if status.st_size != entry.size:
                return f"has {status.st_size} bytes instead of {entry.size}"
            if hashes and _digest(path) != entry.sha256:
                return "sha256 differs"
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"unreadable ({error})"
        return None


def seal(path: Path) -> FileEntry:
    """Force a finished file to the disk and return its entry."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileEntry(size=path.stat().st_size, sha256=_digest(path))


def write_sealed(path: Path, content: bytes) -> FileEntry:
    """Write a small file, force it to the disk and return its entry."""
    path.write_bytes(content)
    return seal(path)


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content so that a reader, or a crash, sees the old or the new one and nothing between."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_sealed(temporary, content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Force the entries of a directory (new names, renames) to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_names(directory: Path) -> list[str]:
    """Names of all files and links below a directory, relative to it; links are listed, never followed."""
    return sorted(name for name in _walk(directory) if not name.endswith("/"))


def _walk(directory: Path, prefix: str = "") -> Iterator[str]:
    """Names of everything below a directory, those of folders with "/" at the end; links are not followed."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            yield f"{prefix}{entry.name}/"
            yield from _walk(directory / entry.name, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}"


def _folders(name: str) -> list[str]:
    """The folders that a listed name lies in, the innermost first."""
    return [str(folder) for folder in PurePosixPath(name).parents][:-1]


def _canonical(content: dict) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
