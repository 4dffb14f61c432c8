"""The ledger: one JSON line per event of a run, in the order of events, the truth that everything else derives from.

A line is one ``write`` and in the hands of the operating system when ``append`` returns, so that a killed process loses
at most the line it was writing, and that torn line is dropped at the next opening. Floats are written as Python's
shortest repr and read back bit for bit; what JSON lacks is a string: "Infinity", "-Infinity", "NaN".

Rows of kind "step", "eval" and "checkpoint" belong to a step: resuming at step N removes the later ones, since these
steps are done again. The removed losses are remembered, and each replayed step is compared with them, so that every
restart tests whether training is deterministic. Rows of kind "start" and "end" tell the lives of the run and stay.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.errors import DataError

Row = dict[str, Any]
LIFE = ("start", "end")
REPLAYED = ("train/loss", "optim/grad_norm")
"""Metrics that a step done again must reproduce."""


@dataclass(frozen=True)
class Past:
    """What a resumed run inherits from the rows that stay."""

    last_step: Row | None
    """The last row of kind "step"."""
    restarts: int
    """How often the run was started before."""
    lost_steps: int
    """Steps that were, or will now be, done again: those behind the checkpoints of all restarts."""


@dataclass(frozen=True)
class Replay:
    """A step that an earlier life of the run had already recorded."""

    ok: bool
    difference: str
    """The first metric that differs and its two values; empty when ``ok``."""
    last: bool
    """Nothing more is known from the earlier life."""


class Ledger:
    """The open ledger of a running job. Only one process, rank 0, writes it."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending and cut off a line that a killed process left unfinished."""
        self._path = path
        self._earlier: dict[int, Row] = {}
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(_whole_lines(path))

    def resume(self, step: int) -> Past:
        """Go back to the state after ``step`` (0: a run from the beginning) and begin a new life of the run.

        Later rows are removed and remembered. The file is rewritten beside the old one and replaces it at once.

        Raises:
            DataError: A line in the middle of the file is damaged.
        """
        last_step, restarts, lost_steps = None, 0, 0
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with open(temporary, "wb") as kept:
            for line, row in _lines(self._path):
                if row["kind"] == "start":
                    restarts += 1
                    lost_steps += row["lost_steps"]
                if row["kind"] in LIFE or row["step"] <= step:
                    kept.write(line)
                    last_step = row if row["kind"] == "step" else last_step
                elif row["kind"] == "step":
                    self._earlier[row["step"]] = row
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(temporary, self._path)
        self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self.append({"kind": "start", "step": step, "time": time.time(), "lost_steps": len(self._earlier)})
        return Past(last_step, restarts, lost_steps + len(self._earlier))

    def append(self, row: Row) -> Replay | None:
        """Write one row; for a step that was recorded before, say whether it came out the same.

        Such a row gets ``health/replay_ok``. ``row`` needs "kind" and "step".
        """
        earlier = self._earlier.pop(row["step"], None) if row["kind"] == "step" else None
        replay = None
        if earlier is not None:
            difference = _difference(earlier, row)
            replay = Replay(not difference, difference, last=not self._earlier)
            row = row | {"health/replay_ok": replay.ok}
        line = json.dumps(_encode(row), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        return replay

    def sync(self) -> None:
        """Force everything written so far to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def read(path: Path) -> list[Row]:
    """All rows of a ledger, also of one that is being written.

    Raises:
        DataError: A line in the middle of the file is damaged.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Lines and their rows; an unfinished last line is left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                row["kind"], row["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not a ledger row ({error}); remove the line, or move the file away for a new one"
                ) from error
            yield line, _decode(row)


def _whole_lines(path: Path) -> int:
    """Length of the file in bytes up to and including its last newline."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for end in range(size, 0, -4096):
            start = max(0, end - 4096)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
    return 0


def _difference(earlier: Row, row: Row) -> str:
    """How a replayed step differs, bit for bit; NaN equals NaN. Empty when it does not."""
    for name in REPLAYED:
        before, now = earlier.get(name), row.get(name)
        if repr(before) != repr(now):
            return f"{name} was {before!r} and is now {now!r}"
    return ""


def _encode(value: Any) -> Any:
    """A value that strict JSON can hold, whatever lists and dicts it is made of."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    """Inverse of ``_encode``."""
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
