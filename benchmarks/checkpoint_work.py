"""What the processes of the checkpoint benchmark share: who takes part, seconds of a turn, files."""

import os
from dataclasses import dataclass
from pathlib import Path

OURS, PLAIN, KEPT, NOBODY = "megatron_ds", "async_save", "async_save, kept stager", "no save"
TORCH, DEEPSPEED = "torch.save", "deepspeed"


@dataclass(frozen=True)
class Turn:
    """Seconds of some steps that began with a save."""

    call: float
    """Of the call that saves."""
    steps: float
    rest: float
    """Still to be waited after the steps, before another save could begin."""


def files_of(directory: Path) -> list[Path]:
    """All files below a directory, in the same order for everybody."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Force a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def forget(directory: Path) -> None:
    """Drop all files, which have to be on the disk, from the page cache."""
    for path in files_of(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Bytes that this process has made the system read from a disk: those ahead included, those in memory not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])
