"""Checkpoints of a run: what is saved where and when, and which one the run starts from.

Two tiers hold the same format: the durable directory, which all nodes see, every ``save_interval`` steps; and, if asked
for, a directory on each node's own disk, every ``local_save_interval``. A run starts from the newest checkpoint that is
whole on all ranks, whichever tier has it. Copying, writing and choosing are in ``checkpoint/``; here they are put
together for a run, and the user is told what came of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Unpack

from megatron_ds.checkpoint.agreement import on_rank_0
from megatron_ds.checkpoint.local import LocalStore
from megatron_ds.checkpoint.lock import DirectoryLock
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import Checkpoint, WeightSource
from megatron_ds.checkpoint.retention import Retention
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
from megatron_ds.checkpoint.tiers import Followed, Outcome, Snapshot, Tier, TieredSaver
from megatron_ds.checkpoint.writing import Content, SaveReport
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.reader import open_hugging_face
from megatron_ds.hf.sections import is_hugging_face_directory
from megatron_ds.parallel.groups import Groups
from megatron_ds.parallel.peers import NodePeers
from megatron_ds.train.monitor import CheckpointReport, Monitor
from megatron_ds.train.run_directory import RunDirectory
from megatron_ds.train.save_hf import HuggingFaceSaver, check_expressible
from megatron_ds.train.save_interval import SaveInterval

DURABLE, LOCAL = "durable", "local"


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    source: WeightSource | None = None
    """A checkpoint or a Hugging Face directory; None: a model with weights of its own making."""
    resumes: bool = False
    """Whether it continues from the source, which then is a checkpoint, or only takes its weights."""
    notes: tuple[str, ...] = ()
    """What was passed over, and why."""


class _Lock(Protocol):
    """What tells whether a directory still is this job's."""

    held: bool


@dataclass(frozen=True)
class _OwnedStore:
    """A store that is not written to any more once another job has taken its directory over, as this one slept."""

    store: CheckpointStore
    lock: _Lock

    def save(self, step: int, fragments: Iterable[Fragment], **content: Unpack[Content]) -> SaveReport:
        def require_held() -> None:
            if not self.lock.held:
                raise CheckpointError("another job has taken the directory over; stop one of the two")

        on_rank_0(self.store.peers, f"saving step {step} to {self.store.directory} failed", require_held)
        return self.store.save(step, fragments, **content)


class Checkpointing:
    """The checkpoints of one run; every method is called by every rank."""

    def __init__(self, config: RunConfig, groups: Groups, run: RunDirectory) -> None:
        """Raises ConfigError when another live job saves into the same directory."""
        check_expressible(config)
        self._config = config.megatron_ds
        self._checkpoints = section = self._config.checkpoint
        self._groups, self._run = groups, run
        self._durable = CheckpointStore(Path(section.save or run.checkpoints), NodePeers.build())
        self._local = None
        if section.local_save is not None:
            directory = Path(section.local_save) / self._config.monitor.run_name
            self._local = LocalStore(directory, NodePeers.build(), neighbour=section.local_save_neighbour)
        self._retention = Retention(section.keep_last, section.save_retain_interval, section.keep_best)
        directory = self._durable.directory
        self._hugging_face = HuggingFaceSaver(directory, section.save_hf) if section.save_hf else None
        self._lock = DirectoryLock(directory, otherwise="give this one another --save") if section.save else None
        if self._lock and groups.rank == 0:
            self._lock.acquire()
        tiers = [Tier(DURABLE, _OwnedStore(self._durable, self._lock or run), self._after_durable)]
        self._saver = TieredSaver(tiers + ([Tier(LOCAL, self._local)] if self._local else []))
        self._num_nodes = len(self._durable.peers.nodes)
        self._interval: SaveInterval | None = None
        self._stall_seconds: dict[int, float] = {}
        self._saved: int | None = None
        self._failed = False
        self.begin(0)

    def begin(self, step: int) -> None:
        """Count from ``step``, which needs no saving: it is where the run starts."""
        self._saved = step
        self._interval = SaveInterval(
            self._checkpoints.save_interval,
            step=step,
            num_nodes=self._num_nodes,
            node_days_per_failure=self._checkpoints.node_days_per_failure,
        )

    def due(self, step: int) -> set[str]:
        """The tiers to save to after ``step``."""
        tiers = {DURABLE} if self._interval.due(step) else set()
        local = self._checkpoints.local_save_interval
        return tiers | {LOCAL} if self._local and local and step % local == 0 else tiers

    def took_step(self, seconds: float) -> None:
        """Count the duration of a step."""
        self._interval.took_step(seconds)

    def save(self, snapshot: Snapshot, tiers: set[str], monitor: Monitor) -> None:
        """Copy a snapshot and have it written; waits for that only when saves are not to be in the background."""
        began = time.monotonic()
        self._saver.save(snapshot, tiers)
        if DURABLE in tiers:
            self._stall_seconds[snapshot.step] = time.monotonic() - began
            self._saved = snapshot.step
            if self._interval.is_auto:
                self._interval.saved(snapshot.step, self._groups.agree(self._interval.estimate()))
        if not self._checkpoints.async_save:
            with monitor.phase("saving"):
                self._saver.wait()
        self.report(monitor)

    def report(self, monitor: Monitor) -> None:
        """Tell the monitor which saves have ended since the last call."""
        for outcome in self._saver.outcomes():
            self._report(outcome, monitor)

    def finish(self, step: int, snapshot: Callable[[], Snapshot], monitor: Monitor) -> None:
        """Save the last step, unless that has been done, and wait until everything is written.

        Raises CheckpointError when the last step could not be saved.
        """
        with monitor.phase("saving"):
            self._saver.wait()
            self.report(monitor)
            if self._saved == step and not self._failed:
                return
            self._saver.save(snapshot(), {DURABLE})
            self._saver.wait()
            for outcome in self._saver.outcomes():
                if isinstance(outcome, Outcome) and outcome.error:
                    raise outcome.error
                self._report(outcome, monitor)

    def close(self, monitor: Monitor) -> None:
        """Write what is left, and let others have the directory."""
        self._saver.close()
        self.report(monitor)
        if self._lock:
            self._lock.release()  # nothing, on ranks that have not acquired it

    @contextmanager
    def start(self, files_needed: Callable[[Checkpoint], set[str]]) -> Iterator[Start]:
        """What this run begins with; readable until the ``with`` statement ends.

        ``files_needed``: the files of a checkpoint that this rank will read, from its headers alone; those on another
        node's disk are fetched. Raises CheckpointError when there is nothing whole, ConfigError when a run would begin
        with its own weights.
        """
        load = Path(self._checkpoints.load) if self._checkpoints.load else None
        from_hugging_face = load is not None and is_hugging_face_directory(load)
        if load is None or self._checkpoints.finetune or from_hugging_face:
            if load and load.resolve() == self._durable.directory.resolve():
                raise ConfigError(
                    f"checkpoint.load = {load}: are the checkpoints of this run, and finetune begins another one; give "
                    f"it a name (--run-name)"
                )
            with self._own(files_needed) as start:
                if load is None or start.source:
                    yield start
                    return
        if from_hugging_face:
            weights = open_hugging_face(load).weights(self._config.model, self._config.moe)
            yield Start(weights, resumes=False, notes=tuple(weights.notes))
        else:
            checkpoint = open_checkpoint(load, peers=self._durable.peers)
            yield Start(checkpoint, not self._checkpoints.finetune, _passed_over(checkpoint.rejected))

    @contextmanager
    def _own(self, files_needed: Callable[[Checkpoint], set[str]]) -> Iterator[Start]:
        """The newest checkpoint of this run in any tier."""
        steps, notes = self._local_steps()
        try:
            durable = self._durable.newest()
        except CheckpointError as error:
            if not steps:
                raise
            durable, notes = None, [*notes, str(error)]
        notes += durable.rejected if durable else []
        if steps and steps[0] > (durable.step if durable else -1):
            known = {self._groups.agree(self._run.known_run_id), durable.trainer["wandb_run_id"] if durable else None}
            with self._local.open(steps[0], files_needed) as checkpoint:
                if checkpoint.trainer["wandb_run_id"] in known:
                    yield Start(checkpoint, True, _passed_over(notes))
                    return
            notes.append(f"{self._local.directory}: step {steps[0]} is of an earlier run of this name")
        yield Start(durable, durable is not None, _passed_over(notes))

    def _local_steps(self) -> tuple[list[int], list[str]]:
        """Steps that are whole on the nodes' disks, newest first, and what was passed over."""
        if self._local is None:
            return [], []
        steps, notes = self._local.steps()
        limit = self._durable.left_at()
        return [step for step in steps if limit is None or step <= limit], notes

    def _after_durable(self, step: int, report: SaveReport) -> list[str]:
        """Make room, and export; on the durable tier's thread."""
        notes = self._retention.apply(self._durable, step)
        if self._hugging_face and self._groups.rank == 0:
            notes += self._hugging_face.after_save(report.path)
        return notes

    def _report(self, outcome: Outcome | Followed, monitor: Monitor) -> None:
        if isinstance(outcome, Followed):
            for line in (*outcome.notes, *([str(outcome.error)] if outcome.error else [])):
                monitor.message(f"  {line}")
            return
        report = outcome.report
        if outcome.tier == DURABLE:
            self._failed = report is None
            stall = self._stall_seconds.pop(outcome.step, None)
            if report:
                stall = report.seconds if stall is None else stall  # at the end, training waits for all of it
                self._interval.took_save(stall, report.seconds)
                monitor.checkpoint(CheckpointReport(outcome.step, report.path, report.seconds, stall, report.bytes))
        for problem in report.problems if report else ():
            monitor.message(f"  {problem}")
        if outcome.error:
            monitor.message(f"{outcome.error}; training goes on, the next save tries again")


def _passed_over(reasons: list[str]) -> tuple[str, ...]:
    return tuple(f"skipped a checkpoint: {reason}" for reason in reasons)
