"""The monitor: takes the facts of each step and tells everyone who wants to know.

Facts become metrics (``metrics.py``). The ledger gets every step; at each log interval the console, W&B, DeepSpeed's
writers and ``status.json`` get the steps since the last one. Only rank 0 writes: the other ranks hold the same object,
whose methods do nothing. Nothing here reduces over ranks, and W&B may not stop a training that goes well: its problems
are said once, then it is given up.
"""

import functools
import math
import netrc
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pydantic import ValidationError

from megatron_ds.config.deepspeed_keys import WandbKeys
from megatron_ds.config.schema import MonitorConfig
from megatron_ds.train.console import open_console
from megatron_ds.train.expert_heatmap import draw_heatmap
from megatron_ds.train.expert_load import expert_metrics, to_record
from megatron_ds.train.expert_watch import ExpertWatch
from megatron_ds.train.ledger import Ledger, Past, Replay
from megatron_ds.train.metrics import (
    EvalResult,
    Interval,
    RunFacts,
    StepRow,
    Value,
    eval_metrics,
    metric,
    step_metrics,
)
from megatron_ds.train.run_directory import RunDirectory, State, without_secrets

if TYPE_CHECKING:  # a dense run needs nothing of it
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

EventWriter = Callable[[list[tuple[str, float, int]]], None]
ETA_WINDOW = 100
"""Steps whose mean wall time the remaining time is estimated from."""
X_AXIS = "progress/tokens"
SMALL_RECORD = 512
"""Experts of all layers up to which the ledger keeps each of them at every step, otherwise at every log interval."""


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that was written."""

    step: int
    path: Path
    seconds: float
    """Until it was whole on the disk."""
    stall_seconds: float
    """How long training waited for it."""
    num_bytes: int


def _rank_zero(method: Callable[..., None]) -> Callable[..., None]:
    """Make a method do nothing on the other ranks."""

    @functools.wraps(method)
    def on_rank_zero(self: "Monitor", *args: Any, **kwargs: Any) -> None:
        if self._writes:
            method(self, *args, **kwargs)

    return on_rank_zero


class Monitor:
    """One per rank. Close it in every case, or the terminal and W&B are left open."""

    run_id: str | None = None
    """W&B's id of the run on rank 0, None elsewhere; checkpoints keep it."""

    def __init__(
        self,
        monitor: MonitorConfig,
        wandb_keys: WandbKeys,
        run: RunDirectory,
        facts: RunFacts,
        *,
        rank: int,
        config: dict[str, Any],
        step: int = 0,
        samples: int = 0,
        tokens: int = 0,
        run_id: str | None = None,
        event_writer: EventWriter | None = None,
    ) -> None:
        """Open the writers and go back to the state after ``step``.

        Args:
            monitor: How often to report.
            wandb_keys: DeepSpeed's ``wandb`` section.
            run: The run directory; rank 0 has acquired it.
            facts: What stays the same during the run.
            rank: Global rank of this process.
            config: The resolved configuration, for W&B.
            step: Optimizer steps already done, 0 for a new run.
            samples: Sequences that they consumed.
            tokens: Tokens that they consumed.
            run_id: W&B's id of this run, if a checkpoint knew it.
            event_writer: Receives (name, value, step) events: ``write_events`` of DeepSpeed's monitor.

        Raises:
            DataError: The ledger of an earlier life is damaged.
        """
        self._writes = rank == 0
        if not self._writes:
            return
        self._log_interval, self._facts, self._run, self._event_writer = monitor.log_interval, facts, run, event_writer
        self.run_id = run.run_id(run_id)
        self._ledger = Ledger(run.ledger)
        past = self._ledger.resume(step)
        progress = {"progress/step": step, "progress/tokens": tokens, "progress/samples": samples}
        self._totals = Totals(past, progress, facts)
        self._console = open_console(facts, step, sys.stdout)
        self._watch = ExpertWatch(monitor, self._console.message)
        self._expert_load: ExpertLoad | None = None
        self._wandb = WandbWriter(wandb_keys, run, self.run_id, facts.name, config, self._console.message)
        self._interval = Interval()
        self._phase: State = "starting"
        self._step = step
        self._replay_differs = False

    @_rank_zero
    def step(self, row: StepRow) -> None:
        """Record an optimizer step; report when a console line is due."""
        if self._phase == "starting":
            self._enter("training")
        self._step = row.step
        metrics = step_metrics(row, self._facts)
        metrics |= self._totals.add(row, metrics)
        record: dict[str, Any] = {}
        if row.expert_load is not None:
            metrics |= expert_metrics(row.expert_load)
            record = self._experts(row.step, row.expert_load)
        replay = self._ledger.append({"kind": "step", "step": row.step, "time": time.time(), **metrics, **record})
        if replay is not None:
            metrics["health/replay_ok"] = replay.ok
            self._say_replay(row.step, replay)
        self._interval.add(metrics, skipped=row.skipped, nan=not math.isfinite(row.loss))
        self._console.step(metrics)
        if row.step % self._log_interval == 0:
            self._report()

    @_rank_zero
    def evaluation(self, step: int, results: Mapping[str, EvalResult]) -> None:
        """Record an evaluation after ``step``; ``results`` by name of the validation set.

        With it goes the load of the experts in that step's training batch, as a record and as a picture.
        """
        metrics, load = eval_metrics(results), self._expert_load
        self._write("eval", step, metrics, {} if load is None else {"experts": to_record(load)})
        self._console.evaluation(step, results)
        if load is not None:
            draw_heatmap(load, f"{self._facts.name}: load of the experts at step {step}", self._run.experts)
            self._wandb.log_image("moe/load", self._run.experts, self._totals.progress)

    @_rank_zero
    def checkpoint(self, report: CheckpointReport) -> None:
        """Record a finished save, and force the ledger to the disk with it."""
        self._totals.saved()
        costs = {"ckpt/save_s": report.seconds, "ckpt/stall_s": report.stall_seconds, "ckpt/bytes": report.num_bytes}
        self._write("checkpoint", report.step, costs)
        self._ledger.sync()
        self._console.message(f"  successfully saved checkpoint at iteration {report.step:7d} to {report.path}")

    @_rank_zero
    def message(self, text: str) -> None:
        """Show text to the user."""
        self._console.message(text)

    @contextmanager
    def phase(self, state: State) -> Iterator[None]:
        """What the run is busy with inside a ``with``: "evaluating" or "saving"; training before and after."""
        self._enter(state)
        yield
        self._enter("training")

    @_rank_zero
    def close(self, state: State, reason: str = "") -> None:
        """End of the run, or of this life of it: report what is left, say how it ended, close every writer."""
        if not self._interval.empty:
            self._report()
        self._ledger.append({"kind": "end", "step": self._step, "time": time.time(), "state": state, "reason": reason})
        self._ledger.close()
        self._run.write_status(state, reason, self._step)
        self._console.close()
        self._wandb.close(exit_code=int(state == "failed"))

    @_rank_zero
    def _enter(self, state: State) -> None:
        self._phase = state
        self._console.phase(state)
        self._run.write_status(state, step=self._step)

    def _experts(self, step: int, load: "ExpertLoad") -> dict[str, Any]:
        """Watch the experts of a step; what its row of the ledger keeps of each of them."""
        self._expert_load = load
        self._watch.step(step, load)
        due = load.chosen_LE.numel() <= SMALL_RECORD or step % self._log_interval == 0
        return {"experts": to_record(load)} if due else {}

    def _report(self) -> None:
        """Tell everyone but the ledger about the steps since the last report."""
        report, self._interval = self._interval.report(), Interval()
        self._console.interval(report)
        self._publish(report.metrics)
        self._run.write_status(self._phase, step=self._step)

    def _write(self, kind: str, step: int, metrics: dict[str, Value], record: Mapping[str, Any] | None = None) -> None:
        """Record something that happened between steps, in a row of its own; ``record`` is for the ledger alone."""
        metrics = self._totals.progress | metrics
        self._ledger.append({"kind": kind, "step": step, "time": time.time(), **metrics, **(record or {})})
        self._publish(metrics)

    def _publish(self, metrics: dict[str, Value]) -> None:
        self._wandb.log(metrics)
        if self._event_writer is not None:
            self._event_writer([(name, float(value), self._step) for name, value in metrics.items()])

    def _say_replay(self, step: int, replay: Replay) -> None:
        """Say how the steps done again compare with their first time: the first difference, or that there was none."""
        if not replay.ok and not self._replay_differs:
            self._replay_differs = True
            self._console.message(f"step {step} came out differently before the restart: {replay.difference}")
        if replay.last and not self._replay_differs:
            self._console.message(f"all steps up to {step} that were done again came out as before the restart")


class Totals:
    """Counts over the whole run, continued from the ledger, and what is left of it."""

    def __init__(self, past: Past, progress: dict[str, Value], facts: RunFacts) -> None:
        last = past.last_step or {}
        self.progress = progress
        self._nan_steps = last.get("health/nan_steps", 0)
        self._skipped_steps = last.get("optim/skipped_steps", 0)
        self._life: dict[str, Value] = {"health/restarts": past.restarts, "health/lost_steps": past.lost_steps}
        self._train_iters = facts.train_iters
        self._ends: deque[float] = deque(maxlen=ETA_WINDOW + 1)
        self._last_save = time.monotonic()

    def add(self, row: StepRow, metrics: Mapping[str, Value]) -> dict[str, Value]:
        """Count a step; ``metrics`` are those that follow from it alone."""
        self.progress = {name: metrics[name] for name in self.progress}
        self._nan_steps += not math.isfinite(row.loss)
        self._skipped_steps += row.skipped
        now = time.monotonic()
        self._ends.append(now)
        # Wall time between steps, so that evaluations and saves are in it; the first, slow step is not.
        spans = len(self._ends) - 1
        seconds = (self._ends[-1] - self._ends[0]) / spans if spans else row.step_seconds
        return {
            "progress/eta_s": seconds * (self._train_iters - row.step),
            "optim/skipped_steps": self._skipped_steps,
            "health/nan_steps": self._nan_steps,
            "health/ckpt_age_s": now - self._last_save,
            **self._life,
        }

    def saved(self) -> None:
        """A checkpoint was written."""
        self._last_save = time.monotonic()


class WandbWriter:
    """W&B, as far as it works: nothing here prompts, and the first failure ends it with one message.

    Runs are offline unless there is a login. Metrics are bound to tokens as x axis, and no step is passed: on a resumed
    run W&B would drop rows whose step it has seen. The run keeps its id over restarts, so that they are one curve.
    """

    def __init__(
        self,
        keys: WandbKeys,
        run: RunDirectory,
        run_id: str,
        name: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        self._say = say
        self._defined: set[str] = set()
        if keys.enabled:
            settings = {
                "project": keys.project,
                "entity": keys.team,
                "group": keys.group,
                "name": name,
                "id": run_id,
                "resume": "allow",
                "dir": str(run.path),
                "config": without_secrets(config),
            }
            self._attempt(lambda: self._open(run.path, settings))

    def log(self, metrics: Mapping[str, Value]) -> None:
        """Log one row."""
        if self._run is not None:
            self._attempt(lambda: self._log(metrics))

    def log_image(self, name: str, path: Path, progress: Mapping[str, Value]) -> None:
        """Log a picture; ``progress`` places it on the x axis."""
        if self._run is not None:
            import wandb

            self._attempt(lambda: self._log({name: wandb.Image(str(path)), **progress}))

    def close(self, exit_code: int) -> None:
        """Finish the run; online, this waits for the upload."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=exit_code))

    def _open(self, path: Path, settings: dict[str, Any]) -> None:
        # Must precede W&B's first look at its environment. Its configuration directory stays where it is: nothing is
        # written there, and it knows the server of the user's login.
        os.environ.setdefault("WANDB_DATA_DIR", str(path / "wandb" / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(path / "wandb" / "cache"))
        import wandb

        chosen = wandb.setup().settings
        mode = chosen.mode if chosen.mode != "online" or _has_login(chosen) else "offline"
        try:
            self._run = self._start(settings, mode)
        except (wandb.Error, OSError) as error:
            if mode != "online":
                raise
            self._say(f"W&B: {_one_line(error)}; recording offline")
            mode, self._run = "offline", self._start(settings, "offline")
        self._run.define_metric("*", step_metric=X_AXIS)
        self._run.define_metric(X_AXIS, hidden=True)
        if mode == "offline":
            folder = path / "wandb"
            self._say(f"W&B: offline; look: wandb leet {folder}\n     upload: wandb sync {folder}/offline-run-*")
        elif self._run.url:
            self._say(f"W&B: {self._run.url}")

    def _start(self, settings: dict[str, Any], mode: str) -> Any:
        import wandb

        # Machine metadata stays off because it holds the command line, where --set may have carried a secret.
        quiet = wandb.Settings(
            console="off", save_code=False, disable_git=True, silent=True, x_disable_meta=True, init_timeout=30
        )
        return wandb.init(mode=mode, settings=quiet, **settings)

    def _log(self, metrics: Mapping[str, Any]) -> None:
        for name in metrics.keys() - self._defined - {X_AXIS}:
            self._run.define_metric(name, step_metric=X_AXIS, summary=metric(name).summary)
            self._defined.add(name)
        self._run.log(dict(metrics))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run an action of W&B; if it fails, say so and be done with W&B."""
        import wandb

        try:
            action()
        except (wandb.Error, OSError, ValidationError) as error:  # the last one: a WANDB_ variable it cannot read
            self._run = None
            self._say(f"W&B: {_one_line(error)}; off from here on, the ledger has every step")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)


def _has_login(settings: Any) -> bool:
    """Whether W&B could upload without asking: a key in its settings or environment, or an entry in netrc."""
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlparse(settings.base_url).hostname in hosts
