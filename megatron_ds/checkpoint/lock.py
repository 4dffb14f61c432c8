"""A lock on a directory that many machines see: one live job at a time, and a dead one never in the way.

Lock files are numbered, and the owner is whoever created the highest: to take over number n is to create n + 1, which
only one process can, so a takeover needs no second lock and can itself be interrupted. A file names its owner (host,
boot, pid namespace, pid, start of the process), complete from the moment it exists; the owner touches it every few
seconds. A released lock is an empty file. On the owner's own host the process table says whether it lives; on any other
a time without a touch does, by the clock of the file system, since those of hosts may differ. Whoever was stopped for
so long that another took over finds a higher number than its own, and has lost the lock.
"""

import os
import re
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_ds.checkpoint.manifest import write_sealed
from megatron_ds.errors import ConfigError

HEARTBEAT_SECONDS = 5.0
"""Between two signs of life of an owner."""
STALE_SECONDS = 60.0
"""Without a sign of life after which an owner on another host counts as dead."""
POLL_SECONDS = 0.2
"""Between two looks at a lock that may become free."""

_LOCK_FILE = re.compile(r"\.lock\.([1-9]\d*)")
_DRAFT = ".lock.draft-"


class Owner(BaseModel):
    """The process that holds a lock, as its lock file names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    boot: str
    pid_namespace: str
    pid: int
    process_started: str

    @classmethod
    def this_process(cls) -> "Owner":
        """The one that asks."""
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_started=_process_start(os.getpid()) or "",
        )

    @property
    def is_near(self) -> bool:
        """Whether its pid means the same process here as there: same boot of the same host, same pid namespace."""
        return (self.host, self.boot, self.pid_namespace) == (socket.gethostname(), _boot(), _pid_namespace())

    @property
    def is_running(self) -> bool:
        """Whether the process that was near still is there, and its pid not another's by now."""
        return _process_start(self.pid) in (self.process_started, None) and _exists(self.pid)


class _LockFile(NamedTuple):
    """The highest lock file as it was found."""

    number: int
    owner: Owner | None
    """None once it was released."""
    touched: float
    """Seconds, by the clock of the file system."""


class DirectoryLock:
    """A lock on ``directory``: its lock files are ``.lock.N`` in there, which no checkpoint consists of."""

    def __init__(self, directory: Path, otherwise: str = "choose another directory") -> None:
        """``otherwise``: what a user can do besides stopping the owner, for the message."""
        self.directory = Path(directory)
        self._otherwise = otherwise
        self._number: int | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Own the directory, which is created if need be, until ``release`` or the death of this process.

        An owner on another host that shows no sign of life is watched until it does, or counts as dead: that takes
        ``STALE_SECONDS`` at most. Raises ConfigError when a live job owns the directory, or it cannot be written to.
        """
        assert self._number is None, f"{self.directory} is locked already"
        draft = self.directory / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                write_sealed(draft, Owner.this_process().model_dump_json().encode())
                self._number = self._take(draft)
            finally:
                draft.unlink(missing_ok=True)
            self._remove_older()
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"{self.directory} cannot be locked ({reason}); name a directory that this job may write to"
            ) from error
        self._released.clear()
        threading.Thread(target=self._keep_alive, args=(self._number,), name="directory_lock", daemon=True).start()

    def release(self) -> None:
        """Let others have the directory; nothing happens when it is not ours, or no longer."""
        if self._number is not None:
            self._released.set()
            with suppress(OSError):
                os.truncate(self._path(self._number), 0)
            self._number = None

    @property
    def held(self) -> bool:
        """Whether the directory still is ours, seen now: false, too, when that cannot be seen."""
        if self._number is None:
            return False
        try:
            # A network file system may remember a list of names for a while, but asks the server when one is opened.
            open(self._path(self._number), "rb").close()
            return self._highest() == self._number
        except OSError:
            return False

    def _take(self, draft: Path) -> int:
        """Give ``draft`` the next number once nobody alive has the highest; the number."""
        seen = None
        while True:
            os.utime(draft)
            now = draft.stat().st_mtime
            found = self._read()
            if found.owner and not self._is_dead(found, now):
                if found.owner.is_near or (seen and seen != found):
                    raise ConfigError(self._in_use_by(found.owner, now - found.touched))
                if seen is None:
                    self._say_waiting(found.owner, STALE_SECONDS - (now - found.touched))
                seen = found
            elif self._create(draft, found.number + 1):
                return found.number + 1
            time.sleep(POLL_SECONDS)

    def _create(self, draft: Path, number: int) -> bool:
        """Try to become the owner; false when another did."""
        try:
            os.link(draft, self._path(number))
        except FileExistsError:
            return False
        # Others may have been and gone since the highest was read, and with them what stood in the way of this number.
        if self._highest() == number:
            return True
        self._path(number).unlink(missing_ok=True)
        return False

    def _read(self) -> _LockFile:
        """The highest lock file; number 0 when there is none."""
        while number := self._highest():
            try:
                # Opening makes a network file system ask the server for the time of the last touch.
                with open(self._path(number), "rb") as file:
                    content, touched = file.read(), os.fstat(file.fileno()).st_mtime
                return _LockFile(number, Owner.model_validate_json(content) if content else None, touched)
            except FileNotFoundError:
                continue  # a higher one exists by now
            except ValidationError as error:
                raise ConfigError(
                    f"{self._path(number)}: not a lock of megatron_ds; delete it if no job uses {self.directory}"
                ) from error
        return _LockFile(0, None, 0.0)

    @staticmethod
    def _is_dead(found: _LockFile, now: float) -> bool:
        return not found.owner.is_running if found.owner.is_near else now - found.touched > STALE_SECONDS

    def _keep_alive(self, number: int) -> None:
        """Touch the lock file until it is released or lost; the body of a thread."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # what a disk refuses once it may allow the next time
                if self._highest() != number:
                    return
                os.utime(self._path(number))

    def _highest(self) -> int:
        names = os.listdir(self.directory)
        return max((int(match[1]) for match in map(_LOCK_FILE.fullmatch, names) if match), default=0)

    def _remove_older(self) -> None:
        """Remove the lock files that are history, and drafts of processes that died while they waited."""
        now = self._path(self._number).stat().st_mtime
        for name in os.listdir(self.directory):
            path, match = self.directory / name, _LOCK_FILE.fullmatch(name)
            with suppress(FileNotFoundError):
                abandoned = name.startswith(_DRAFT) and now - path.stat().st_mtime > STALE_SECONDS
                if abandoned or (match and int(match[1]) < self._number):
                    path.unlink()

    def _path(self, number: int) -> Path:
        return self.directory / f".lock.{number}"

    def _in_use_by(self, owner: Owner, age: float) -> str:
        return (
            f"{self.directory} is in use by pid {owner.pid} on host {owner.host} (last sign of life "
            f"{max(0, round(age))} s ago); stop that job or {self._otherwise}"
        )

    def _say_waiting(self, owner: Owner, seconds: float) -> None:
        print(
            f"{self.directory}: pid {owner.pid} on host {owner.host} may be dead; "
            f"it is watched for {max(0, round(seconds))} s at most",
            file=sys.stderr,
            flush=True,
        )


def _boot() -> str:
    """What is different after every boot of a host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())


def _pid_namespace() -> str:
    """Containers number their processes each on its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _process_start(pid: int) -> str | None:
    """When a process started, exactly and whatever the clock was set to since; None where that is not to be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        with suppress(psutil.Error):
            return str(psutil.Process(pid).create_time())
        return None
