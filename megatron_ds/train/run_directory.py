"""The run directory: where everything that a run leaves behind has its place, and the lock that one job holds on it.

``runs/NAME`` holds ``config.json``, ``ledger.jsonl``, ``status.json``, ``experts.png`` of a model with experts,
``wandb/`` and ``checkpoints/``. The same command finds the same directory and resumes. Rank 0 acquires it; the
lock of a process that died, however it did, is taken over, so a crash never locks anyone out.
``status.json`` says in a few words how the run is doing: scripts read it instead of the launcher's exit code, which
depends on which rank was noticed first.
"""

import json
import os
import re
import secrets
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_ds.checkpoint.lock import DirectoryLock
from megatron_ds.checkpoint.manifest import replace_file
from megatron_ds.errors import ConfigError

State = Literal["starting", "training", "evaluating", "saving", "finished", "failed", "stopped", "preempted"]
SECRET = re.compile(r"(?:^|_)(?:(?:api|access|secret|private)_?key|token|secret|password|credentials?)$")
"""Names of settings whose values are never written."""


class RunDirectory:
    """Paths and small files of one run. Building it touches nothing; ``acquire`` does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.ledger = self.path / "ledger.jsonl"
        self.status = self.path / "status.json"
        self.experts = self.path / "experts.png"
        self.checkpoints = self.path / "checkpoints"
        self._run_id = self.path / "run_id"
        self._lock = DirectoryLock(self.path, otherwise="give this one another --run-name")
        self._started: datetime | None = None

    def acquire(self) -> None:
        """Create the directory and own it until the process ends.

        Raises:
            ConfigError: Another live job owns it, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run directory {self.path} cannot be created: {error.strerror}; set --run-dir to a writable directory"
            ) from error
        self._lock.acquire()
        self._started = datetime.now(UTC)
        self.write_status("starting")

    def release(self) -> None:
        """Give the directory back before the process ends."""
        self._lock.release()

    @property
    def held(self) -> bool:
        """Whether it still is this job's, seen now; another may have taken it over while this one was stopped."""
        return self._lock.held

    def write_config(self, tree: dict[str, Any]) -> None:
        """Write the resolved configuration, without values that look like secrets."""
        replace_file(self.config, _json(without_secrets(tree)))

    def write_status(self, state: State, reason: str = "", step: int | None = None) -> None:
        """Replace ``status.json``; readers see the old or the new one, never a part."""
        assert self._started is not None, "only the process that acquired the run directory writes its status"
        status = {
            "state": state,
            "reason": reason,
            "step": step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self._started.isoformat(timespec="seconds"),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        replace_file(self.status, _json(status))

    @property
    def known_run_id(self) -> str | None:
        """W&B's id that this directory keeps, once it has one."""
        return self._run_id.read_text().strip() if self._run_id.exists() else None

    def run_id(self, known: str | None = None) -> str:
        """W&B's id of this run: ``known`` (from a checkpoint), else the stored one, else a new one; stored at once."""
        run_id = known or self.known_run_id or secrets.token_hex(4)
        replace_file(self._run_id, f"{run_id}\n".encode())
        return run_id


def without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """Copy of a configuration tree without the keys that name a secret (``api_key``, ``token``, ``password`` ...)."""
    return {
        key: without_secrets(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if not SECRET.search(key.lower().replace("-", "_"))
    }


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=2).encode() + b"\n"
