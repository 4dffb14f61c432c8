"""Lengths of the learning rate's phases, in the unit that the run counts in.

A run counts optimizer steps, or samples when ``train_samples`` is given: the lengths of warmup and decay are then in
samples, too (Megatron's rule). ``lr_phases`` replace the decay by a list of phases that end at numbers of tokens. The
curve itself is in ``optim/lr_schedule.py``, what must fit in ``schedule_rules.py``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ds.config.batch_plan import BatchPlan
from megatron_ds.config.schema import TrainingConfig
from megatron_ds.config.token_schedule import parse_count


@dataclass(frozen=True)
class Lengths:
    """Warmup and decay, counted in steps or in samples."""

    unit: Literal["iters", "samples"]
    """How the keys of these lengths end."""
    decay: int
    """Where the decay is over; the warmup is part of it."""
    warmup: float
    """A share of the decay is not rounded to a whole number: Megatron does not either."""
    wsd: int
    """Length of WSD's final decay."""


def lengths(training: TrainingConfig) -> Lengths:
    """The lengths of a schedule, defaults filled in."""
    if training.train_samples is not None:
        unit, decay = "samples", training.lr_decay_samples or training.train_samples
        warmup, wsd = training.lr_warmup_samples, training.lr_wsd_decay_samples
    else:
        unit, decay = "iters", training.lr_decay_iters or training.train_iters
        warmup, wsd = training.lr_warmup_iters, training.lr_wsd_decay_iters
    share = training.lr_warmup_fraction
    return Lengths(unit, decay, share * decay if share is not None else warmup or 0, wsd or math.ceil(decay / 10))


def warmup_tokens(training: TrainingConfig, plan: BatchPlan, seq_length: int) -> int:
    """Tokens consumed when the warmup is over, where the first of ``lr_phases`` begins."""
    length = lengths(training)
    end = math.ceil(length.warmup)
    return (end if length.unit == "samples" else plan.samples_after(end)) * seq_length


@dataclass(frozen=True)
class Phase:
    """One phase of a schedule in tokens."""

    until: int
    """Tokens consumed at its end."""
    style: str
    """constant, linear, cosine or exponential."""
    lr: float | None
    """Learning rate at the end, of ``constant`` throughout; None keeps the last one."""


def phases(training: TrainingConfig) -> tuple[Phase, ...]:
    """``lr_phases``, read."""
    found = []
    for word in training.lr_phases:
        until, style, *lr = word.split(":")
        found.append(Phase(parse_count(until), style, float(lr[0]) if lr else None))
    return tuple(found)
