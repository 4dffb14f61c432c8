"""What a save directory holds, leftovers and damaged checkpoints included, from names, sizes and headers alone.

Looking never changes anything and reads no tensor, so it is quick for the largest checkpoints and harmless beside a
run that is saving. Whether bytes are intact is not known here: ``Manifest.problems`` hashes them.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.checkpoint.manifest import MANIFEST, list_names
from megatron_ds.checkpoint.reader import MEAN, Checkpoint
from megatron_ds.checkpoint.retention import validation_loss
from megatron_ds.checkpoint.store import LATEST, STEP_DIRECTORY, open_checkpoint
from megatron_ds.errors import CheckpointError, ConfigError

_ANY_STEP = re.compile(rf"{STEP_DIRECTORY.pattern}(\.tmp)?")
LEFTOVER = "left by an interrupted save or removal; the next save removes it"
SET_ASIDE = "set aside by an interrupted save; the next save puts it back, or removes it"
AVERAGED = "averaged_steps"
"""Key in the trainer state of a mean of checkpoints, which holds weights only: the steps that it was made of."""


@dataclass(frozen=True)
class Listed:
    """One directory of a step."""

    path: Path
    step: int
    size: int
    """Bytes of all of its files."""
    saved: float
    """When it was written, in seconds since 1970."""
    checkpoint: Checkpoint | None
    """None when it is not whole."""
    note: str
    """Why it is not whole, or what it is besides a checkpoint."""
    is_latest: bool
    """Whether ``latest`` names it."""

    @property
    def layout(self) -> str:
        """How the run that wrote it was split; of a mean of checkpoints the steps that it was made of."""
        steps = self.checkpoint.trainer.get(AVERAGED)
        if steps:
            return f"mean of {', '.join(map(str, steps))}"
        config = self.checkpoint.config
        try:
            parallel, stage = config["megatron_ds"]["parallel"], config["zero_optimization"]["stage"]
            tensor, pipe = parallel["tensor_model_parallel_size"], parallel["pipeline_model_parallel_size"]
            expert = parallel["expert_model_parallel_size"]
        except (KeyError, TypeError):
            return "unknown"
        data = self.checkpoint.manifest.world_size // (tensor * pipe)
        return f"tp {tensor} pp {pipe} dp {data} ep {expert} ZeRO-{stage}"

    @property
    def has_mean(self) -> bool:
        """Whether it holds the running mean of the weights."""
        return bool(self.checkpoint.shapes(MEAN))

    @property
    def validation_loss(self) -> float | None:
        """Mean over the validation sets of the last evaluation; None without one."""
        return validation_loss(self.checkpoint.trainer)


def save_directory(path: Path) -> Path:
    """The directory with the steps: ``path`` itself, or ``checkpoints/`` in a run directory.

    Raises ConfigError when there is no step in either.
    """
    for directory in (path, path / "checkpoints"):
        if directory.is_dir() and any(map(_ANY_STEP.fullmatch, (entry.name for entry in directory.iterdir()))):
            return directory
    raise ConfigError(f"{path}: no global_step* directory; give a save directory, or a run directory such as runs/NAME")


def step_directories(path: Path) -> list[Path]:
    """All checkpoints at ``path`` that claim to be whole, by step: of a save or run directory, or that step alone.

    Raises ConfigError when there is none.
    """
    if STEP_DIRECTORY.fullmatch(path.name) or (path / MANIFEST).exists():
        return [path]
    found = [entry for entry in save_directory(path).iterdir() if STEP_DIRECTORY.fullmatch(entry.name)]
    if not found:
        raise ConfigError(f"{path}: no finished checkpoint, only what interrupted saves left")
    return sorted(found, key=lambda entry: (_step(entry), not entry.suffix))


def list_checkpoints(path: Path) -> list[Listed]:
    """Every step directory of a save or run directory, by step; ConfigError when there is none."""
    directory = save_directory(path)
    pointer = directory / LATEST
    latest = pointer.read_text(errors="replace").strip() if pointer.is_file() and not pointer.is_symlink() else ""
    entries = [entry for entry in directory.iterdir() if _ANY_STEP.fullmatch(entry.name)]
    listed = []
    for entry in sorted(entries, key=lambda entry: (_step(entry), entry.name)):
        with suppress(FileNotFoundError):  # a run that is saving has renamed or removed it
            listed.append(_look(entry, latest))
    return listed


def best(listed: list[Listed]) -> Listed | None:
    """The whole checkpoint with the lowest validation loss; None when none was evaluated."""
    known = [one for one in listed if one.checkpoint and one.validation_loss is not None]
    return min(known, key=lambda one: one.validation_loss, default=None)


def _look(path: Path, latest: str) -> Listed:
    checkpoint, note = None, LEFTOVER
    if path.suffix != ".tmp":
        try:
            checkpoint, note = open_checkpoint(path, verify=False), SET_ASIDE if path.suffix else ""
            checkpoint.config, checkpoint.trainer  # noqa: B018  (reading them is the check)
        except CheckpointError as error:
            checkpoint, note = None, f"damaged: {str(error).removeprefix(f'cannot use {path}: ')}"
    names = [] if path.is_symlink() else list_names(path)
    size = sum((path / name).lstat().st_size for name in names)
    saved = (path / MANIFEST if MANIFEST in names else path).lstat().st_mtime
    return Listed(path, _step(path), size, saved, checkpoint, note, path.name == latest)


def _step(path: Path) -> int:
    return int(_ANY_STEP.fullmatch(path.name)[1])
