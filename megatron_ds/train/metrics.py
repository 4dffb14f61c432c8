"""The metrics: what the loop measured in one step, and the names, units and rules of everything derived from it.

``METRICS`` is the vocabulary of the ledger, the console, W&B, DeepSpeed's writers and the report; docs/monitoring.md
says what each means and which values are healthy. Names are ``section/name``, one section per part of a dashboard.
Pure arithmetic on one process: values arrive here already reduced over ranks.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # arithmetic needs no torch
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

Value = float | int | bool
GIB = 1 << 30


@dataclass(frozen=True)
class RunFacts:
    """What stays the same during a run and gives its measurements a scale."""

    name: str
    train_iters: int
    seq_length: int
    """Tokens of a sequence, padding included."""
    devices: int = 1
    """Ranks that compute: accelerators, or processes on a CPU."""
    gradient_clipping: float = 0.0
    """Largest gradient norm; 0 is off."""
    peak_flops: float | None = None
    """Published peak of one device in FLOP/s for the run's dtype, where it is known."""
    roof_flops: float | None = None
    """Matrix multiplication rate of one device in FLOP/s, measured, where no peak is published (CPU)."""
    eval_interval: int | None = None
    save_interval: int | None = None


@dataclass(frozen=True)
class StepRow:
    """The measured facts of one optimizer step; counts are totals after it."""

    step: int
    """Number of the step, from 1."""
    consumed_samples: int
    consumed_tokens: int
    batch_size: int
    """Sequences of this step, over all ranks."""
    loss: float
    """Mean over all counted tokens of the global batch, nats per token."""
    counted_tokens: int
    """Targets of this step that entered the loss."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    loss_scale: float
    skipped: bool
    """The optimizer left the weights as they were, because a gradient overflowed."""
    step_seconds: float
    data_seconds: float
    """Part of ``step_seconds`` spent waiting for data."""
    flops_per_token: float
    """Forward and backward of the model, without recomputation (model/cost.py)."""
    host_rss_bytes: int
    device_peak_bytes: int | None = None
    mtp_loss: float | None = None
    """Loss of the blocks that predict further tokens, before its weight; None without such."""
    expert_load: "ExpertLoad | None" = None
    """What the experts did, if the model has any; ``expert_load.py`` makes metrics of it."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further metrics of the step by their full name."""


@dataclass(frozen=True)
class EvalResult:
    """One validation set."""

    loss: float
    """Mean over its counted tokens, nats per token."""
    tokens: int
    num_bytes: float | None = None
    """Bytes of the text behind the counted tokens, where known."""

    @property
    def ppl(self) -> float:
        """Perplexity, exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else self.loss * math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in a unit that does not depend on the tokenizer."""
        return self.loss * self.tokens / math.log(2) / self.num_bytes if self.num_bytes else None


def mean_of_finite(values: list[Value]) -> float:
    """Mean of the finite values, NaN when there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def last(values: list[Value]) -> Value:
    """The newest value: right for totals and settings."""
    return values[-1]


def mean_rate(values: list[Value], work: list[Value]) -> float:
    """Rate over the whole interval: the harmonic mean of the steps' rates, weighted by how much work each did."""
    return statistics.harmonic_mean(values, weights=work)


@dataclass(frozen=True)
class Metric:
    """How a metric is measured and condensed."""

    unit: str
    interval: Callable[..., Value] = last
    """Condenses the steps between two console lines into one value; ``mean_rate`` weighs them by their batch."""
    summary: Literal["min", "max", "mean"] | None = None
    """What stands for the whole run in W&B's run table; by default the newest value."""


METRICS: dict[str, Metric] = {
    "progress/step": Metric("steps"),
    "progress/tokens": Metric("tokens"),
    "progress/samples": Metric("sequences"),
    "progress/eta_s": Metric("s"),
    "train/loss": Metric("nats/token", mean_of_finite, "min"),
    "train/mtp_loss": Metric("nats/token", mean_of_finite, "min"),
    "train/batch_size": Metric("sequences/step"),
    "train/supervised_tokens": Metric("tokens/step", mean_of_finite),
    "optim/lr": Metric("1"),
    "optim/grad_norm": Metric("1", last, "max"),
    "optim/clip_frac": Metric("share of steps", mean_of_finite, "mean"),
    "optim/loss_scale": Metric("1"),
    "optim/skipped_steps": Metric("steps"),
    "perf/step_s": Metric("s/step", mean_of_finite, "mean"),
    "perf/tokens_per_s": Metric("tokens/s", mean_rate, "mean"),
    "perf/tokens_per_s_per_device": Metric("tokens/s", mean_rate, "mean"),
    "perf/tflops_per_device": Metric("TFLOP/s", mean_rate, "mean"),
    "perf/mfu_pct": Metric("%", mean_rate, "mean"),
    "perf/roof_pct": Metric("%", mean_rate, "mean"),
    "perf/data_wait_pct": Metric("%", mean_of_finite, "mean"),
    "mem/device_peak_gib": Metric("GiB", max, "max"),
    "mem/host_rss_gib": Metric("GiB", max, "max"),
    "data/supervised_pct": Metric("%", mean_of_finite, "mean"),
    "moe/assignments": Metric("1/step"),
    "moe/load_cv": Metric("1", mean_of_finite, "mean"),
    "moe/max_over_mean": Metric("1", mean_of_finite, "mean"),
    "moe/max_over_mean_layer_mean": Metric("1", mean_of_finite, "mean"),
    "moe/entropy": Metric("1", mean_of_finite, "mean"),
    "moe/entropy_layer_mean": Metric("1", mean_of_finite, "mean"),
    "moe/dead_experts": Metric("experts", mean_of_finite, "mean"),
    "moe/dropped_pct": Metric("%", mean_of_finite, "mean"),
    "moe/bias_min": Metric("1"),
    "moe/bias_max": Metric("1"),
    "moe/rank_max_over_mean": Metric("1", mean_of_finite, "mean"),
    "moe/bytes_sent": Metric("bytes/step", mean_of_finite, "mean"),
    "moe/exchange_s": Metric("s/step", mean_of_finite, "mean"),
    "moe/exposed_s": Metric("s/step", mean_of_finite, "mean"),
    "moe/aux_loss": Metric("1", mean_of_finite, "mean"),
    "health/nan_steps": Metric("steps"),
    "health/restarts": Metric("starts"),
    "health/lost_steps": Metric("steps"),
    "health/replay_ok": Metric("true/false", min),
    "health/ckpt_age_s": Metric("s"),
    "eval/loss": Metric("nats/token", last, "min"),
    "eval/ppl": Metric("1", last, "min"),
    "eval/bits_per_byte": Metric("bits/byte", last, "min"),
    "eval/tokens": Metric("tokens"),
    "ckpt/save_s": Metric("s", last, "mean"),
    "ckpt/stall_s": Metric("s", last, "mean"),
    "ckpt/bytes": Metric("bytes"),
}
"""Every metric. A named validation set adds ``eval/<set>/loss`` and so on, with the rules of ``eval/loss``."""


def metric(name: str) -> Metric:
    """The rules of a metric, that of a named validation set or of a step's ``extra`` included."""
    section, _, rest = name.partition("/")
    return METRICS.get(name) or METRICS.get(f"{section}/{rest.rpartition('/')[2]}") or Metric("1")


def step_metrics(row: StepRow, facts: RunFacts) -> dict[str, Value]:
    """Everything that follows from one step alone."""
    tokens = row.batch_size * facts.seq_length
    per_device = tokens / row.step_seconds / facts.devices
    flops = per_device * row.flops_per_token
    metrics: dict[str, Value] = {
        "progress/step": row.step,
        "progress/tokens": row.consumed_tokens,
        "progress/samples": row.consumed_samples,
        "train/loss": float(row.loss),
        "train/batch_size": row.batch_size,
        "train/supervised_tokens": row.counted_tokens,
        "optim/lr": float(row.lr),
        "optim/grad_norm": float(row.grad_norm),
        "optim/clip_frac": float(0 < facts.gradient_clipping < row.grad_norm),
        "optim/loss_scale": float(row.loss_scale),
        "perf/step_s": row.step_seconds,
        "perf/tokens_per_s": per_device * facts.devices,
        "perf/tokens_per_s_per_device": per_device,
        "perf/tflops_per_device": flops / 1e12,
        "perf/data_wait_pct": 100 * row.data_seconds / row.step_seconds,
        "mem/host_rss_gib": row.host_rss_bytes / GIB,
        "data/supervised_pct": 100 * row.counted_tokens / tokens,
    }
    if row.mtp_loss is not None:
        metrics["train/mtp_loss"] = row.mtp_loss
    if facts.peak_flops is not None:
        metrics["perf/mfu_pct"] = 100 * flops / facts.peak_flops
    if facts.roof_flops is not None:
        metrics["perf/roof_pct"] = 100 * flops / facts.roof_flops
    if row.device_peak_bytes is not None:
        metrics["mem/device_peak_gib"] = row.device_peak_bytes / GIB
    return metrics | row.extra


def eval_metrics(results: Mapping[str, EvalResult]) -> dict[str, Value]:
    """Metrics of an evaluation: over all sets, weighted by tokens, and with several sets those of each."""
    metrics = _eval_entries("eval", _together(list(results.values())))
    if len(results) > 1:
        for name, result in results.items():
            metrics |= _eval_entries(f"eval/{name}", result)
    return metrics


def _eval_entries(prefix: str, result: EvalResult) -> dict[str, Value]:
    entries: dict[str, Value] = {
        f"{prefix}/loss": result.loss,
        f"{prefix}/ppl": result.ppl,
        f"{prefix}/tokens": result.tokens,
    }
    if result.bits_per_byte is not None:
        entries[f"{prefix}/bits_per_byte"] = result.bits_per_byte
    return entries


def _together(results: list[EvalResult]) -> EvalResult:
    """Several sets as one."""
    tokens = sum(result.tokens for result in results)
    num_bytes = [result.num_bytes for result in results]
    loss = sum(result.loss * result.tokens for result in results) / max(tokens, 1)
    return EvalResult(loss, tokens, None if None in num_bytes else sum(num_bytes))


@dataclass(frozen=True)
class IntervalReport:
    """The steps between two console lines, condensed."""

    metrics: dict[str, Value]
    skipped: int
    nan: int


class Interval:
    """Collects steps until a console line is due."""

    def __init__(self) -> None:
        self._values: dict[str, list[Value]] = {}
        self._skipped = 0
        self._nan = 0

    def add(self, metrics: dict[str, Value], *, skipped: bool, nan: bool) -> None:
        """Take in one step."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        self._skipped += skipped
        self._nan += nan

    @property
    def empty(self) -> bool:
        """Whether nothing has been collected."""
        return not self._values

    def report(self) -> IntervalReport:
        """Condense what was collected."""
        work, metrics = self._values["train/batch_size"], {}
        for name, values in self._values.items():
            condense = metric(name).interval
            metrics[name] = condense(values, work) if condense is mean_rate else condense(values)
        return IntervalReport(metrics, self._skipped, self._nan)
