"""Retention: which checkpoints stay, and the removal of the others.

A checkpoint goes only after a newer one has been read back from the disk and found whole, so there is a valid one at
every moment, whatever fails in between. Steps beyond the newest belong to a branch that was left; they are the user's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.checkpoint.agreement import on_rank_0
from megatron_ds.checkpoint.reader import TRAINER
from megatron_ds.checkpoint.store import STEP_DIRECTORY, CheckpointStore, open_checkpoint
from megatron_ds.checkpoint.writing import discard


@dataclass(frozen=True)
class Retention:
    """What to keep besides the newest; each rule adds to the others, and without ``keep_last`` everything stays."""

    keep_last: int | None = None
    """The newest checkpoints, so many in all."""
    retain_interval: int | None = None
    """Those of steps that are multiples of this."""
    keep_best: bool = False
    """The one with the lowest validation loss."""

    def surplus(self, newest: int, losses: Mapping[int, float | None]) -> list[int]:
        """Steps to remove once ``newest`` is known to be whole.

        Args:
            newest: The step that was just saved.
            losses: Validation loss of every step on the disk; None where there is none.
        """
        if self.keep_last is None:
            return []
        steps = sorted(step for step in losses if step <= newest)
        kept = {newest, *steps[-self.keep_last :]}
        if self.retain_interval is not None:
            kept |= {step for step in steps if step % self.retain_interval == 0}
        known = [step for step in steps if losses[step] is not None]
        if self.keep_best and known:
            kept.add(min(known, key=lambda step: losses[step]))
        return [step for step in steps if step not in kept]

    def apply(self, store: CheckpointStore, newest: int) -> list[str]:
        """Remove the surplus; every rank calls it. Returns a line for the user when something went.

        Raises CheckpointError when the newest is not whole, and removes nothing then.
        """
        action = f"removing old checkpoints in {store.directory} failed"
        surplus = on_rank_0(store.peers, action, lambda: self.surplus(newest, validation_losses(store.directory)))
        if not surplus:
            return []
        open_checkpoint(store.directory / f"global_step{newest}", peers=store.peers)
        on_rank_0(store.peers, action, lambda: [discard(store.directory / f"global_step{step}") for step in surplus])
        return [f"removed the checkpoints of steps {', '.join(map(str, surplus))}"]


def validation_losses(directory: Path) -> dict[int, float | None]:
    """The ``validation_loss`` of every checkpoint in a directory, by step; None, too, for one that is damaged."""
    losses: dict[int, float | None] = {}
    for path in directory.iterdir():
        match = STEP_DIRECTORY.fullmatch(path.name)
        if match and not match[2]:
            try:
                losses[int(match[1])] = validation_loss(json.loads((path / TRAINER).read_bytes()))
            except (OSError, ValueError):
                losses[int(match[1])] = None
    return losses


def validation_loss(trainer: dict) -> float | None:
    """Mean over the validation sets, at the last evaluation before this state of the trainer; None without one."""
    values = list((trainer.get("eval") or {}).values())
    return sum(values) / len(values) if values else None
