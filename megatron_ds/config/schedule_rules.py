"""Rules of what changes during a run: length, batch size, learning rate; in the form that ``rules.py`` describes."""

import itertools
import math
from collections.abc import Iterator

from megatron_ds.config.batch_plan import batch_plan
from megatron_ds.config.lr_plan import lengths, phases, warmup_tokens
from megatron_ds.config.problems import Problem, problem
from megatron_ds.config.resolve import Batch, complete_batch, data_parallel_size, nearest_multiples, peak_lr
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.token_schedule import TokenSchedule

_BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "parallel.pipeline_model_parallel_size",
    "parallel.tensor_model_parallel_size",
)
_RAMP, _STEPS = "training.rampup_batch_size", "training.step_batch_size_schedule"
_WARMUP = ("warmup_iters", "warmup_samples", "warmup_fraction")
_LENGTHS = ("training.train_samples", "training.train_iters")


def _batch(config: RunConfig, world_size: int) -> Batch | None:
    """The batch triangle, if there is one."""
    ranks = data_parallel_size(config, world_size)
    batch = complete_batch(config, ranks) if ranks is not None else None
    return batch if isinstance(batch, Batch) else None


# --- values that change with the tokens -----------------------------------------------------------------------------


def schedules_go_forward(config: RunConfig) -> Iterator[Problem]:
    training, moe = config.megatron_ds.training, config.megatron_ds.moe
    schedules = {
        _STEPS: training.step_batch_size_schedule,
        "training.mtp_loss_scaling_factor": training.mtp_loss_scaling_factor,
        "moe.moe_router_bias_update_rate": moe.moe_router_bias_update_rate if moe else None,
    }
    for where, text in schedules.items():
        starts = TokenSchedule.parse(text).starts if text is not None else ()
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            yield problem(
                config, where, "every pair must begin at more tokens than the one before", "put them in order"
            )


# --- batch ----------------------------------------------------------------------------------------------------------


def the_batch_grows_in_one_way(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    if training.rampup_batch_size is not None and training.step_batch_size_schedule is not None:
        yield problem(config, _RAMP, "step_batch_size_schedule is given too", "leave one of the two out", _STEPS)


def the_batch_grows_to_its_full_size(config: RunConfig, world_size: int) -> Iterator[Problem]:
    training, batch = config.megatron_ds.training, _batch(config, world_size)
    if batch is None:
        return
    full = f"train_batch_size {batch.train}"
    if training.rampup_batch_size is not None:
        start, increment, _ = training.rampup_batch_size
        if start > batch.train or (batch.train - start) % increment:
            rule = f"start {start} plus a multiple of the increment {increment} must be {full}"
            fix = f"set train_batch_size to {nearest_multiples(max(batch.train - start, 0), increment, start)}"
            yield problem(config, _RAMP, rule, fix, _STEPS, *_BATCH)
    if training.step_batch_size_schedule is not None:
        sizes = TokenSchedule.parse(training.step_batch_size_schedule).values
        if sizes[-1] != batch.train or max(sizes) > batch.train:
            rule = f"the last batch must be {full}, and none larger"
            yield problem(config, _STEPS, rule, f"set train_batch_size to {max(sizes):g}", _RAMP, *_BATCH)


def batches_on_the_way_are_whole(config: RunConfig, world_size: int) -> Iterator[Problem]:
    ours, batch = config.megatron_ds, _batch(config, world_size)
    if batch is None:
        return
    unit = batch.micro * data_parallel_size(config, world_size)
    words = "micro batch x data-parallel ranks"
    if ours.parallel.schedule.kind == "interleaved":
        unit *= ours.parallel.pipeline_model_parallel_size
        words += " x pipeline ranks (micro-batches of the interleaved schedule come in groups)"
    sizes = batch_plan(ours.training, batch.train, ours.model.seq_length).sizes
    odd = [size for size in sizes if size % unit]
    if not odd:
        return
    rule = f"a global batch must be a multiple of {words} = {unit}, and {odd[0]} is not"
    fix = f"make it {nearest_multiples(odd[0], unit)}"
    where = _RAMP if ours.training.rampup_batch_size is not None else _STEPS
    where = where if len(sizes) > 1 else "train_batch_size"
    yield problem(config, where, rule, fix, _RAMP, _STEPS, *_BATCH, "parallel.schedule.kind")


# --- length ---------------------------------------------------------------------------------------------------------


def lengths_have_one_unit(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    unit, other = ("samples", "iters") if training.train_samples is not None else ("iters", "samples")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if getattr(training, f"{name}_{other}") is not None:
            rule = f"the run counts {'sequences' if unit == 'samples' else 'steps'}"
            fix = f"give {name}_{unit}, or {'leave train_samples out' if unit == 'samples' else 'train_samples'}"
            yield problem(config, f"training.{name}_{other}", rule, fix, *_LENGTHS)


def the_length_is_given_once(config: RunConfig, world_size: int) -> Iterator[Problem]:
    training, batch = config.megatron_ds.training, _batch(config, world_size)
    if batch is None or training.train_samples is None:
        return
    steps = batch_plan(training, batch.train, config.megatron_ds.model.seq_length).steps_within(training.train_samples)
    reads = (*_LENGTHS, _RAMP, _STEPS, *_BATCH)
    if steps == 0:
        fix = f"set it to {batch.train} or more"
        yield problem(config, "training.train_samples", "is less than the first global batch", fix, *reads)
    elif "train_iters" in training.model_fields_set and training.train_iters != steps:
        rule = f"train_samples {training.train_samples} is given too, which is {steps} steps"
        yield problem(config, "training.train_iters", rule, "leave one of the two out", *reads)


# --- learning rate --------------------------------------------------------------------------------------------------


def learning_rates_fall(config: RunConfig, world_size: int) -> Iterator[Problem]:
    training, batch = config.megatron_ds.training, _batch(config, world_size)
    if batch is None:
        return
    peak = peak_lr(config, batch.train)
    automatic = config.optimizer.params.lr == "auto"
    source = f'{peak:g} ("auto" at a global batch of {batch.train})' if automatic else f"{peak:g}"
    reads = ("optimizer.params.lr", *(_BATCH if automatic else ()))
    rates = {"min_lr": training.min_lr, "lr_warmup_init": training.lr_warmup_init}
    rates["lr_phases"] = max((phase.lr or 0.0 for phase in phases(training)), default=0.0)
    for name, value in rates.items():
        if value > peak:
            rule = f"must not exceed the peak learning rate {source}"
            yield problem(config, f"training.{name}", rule, f"set it to {peak:g} or less", *reads)


def warmup_is_given_once(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    for unit in ("iters", "samples"):
        length = getattr(training, f"lr_warmup_{unit}")
        if length is not None and training.lr_warmup_fraction is not None:
            rule = f"lr_warmup_{unit} {length} is given too"
            fix = "set one of the two to null (--lr-warmup-fraction none)"
            yield problem(config, "training.lr_warmup_fraction", rule, fix, f"training.lr_warmup_{unit}", *_LENGTHS)


def phases_fit_the_schedule(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    if training.lr_phases:
        return
    length = lengths(training)
    unit, style = length.unit, training.lr_decay_style
    decay = {"constant": 0, "WSD": length.wsd}.get(style, 1)
    if length.warmup + decay <= length.decay:
        return
    words = "steps" if unit == "iters" else "sequences"
    rule = f"{length.warmup:g} {words} of warmup and {decay} of {style} decay do not fit into {length.decay} {words}"
    if style == "WSD" and getattr(training, f"lr_wsd_decay_{unit}") is not None and length.warmup < length.decay:
        where, most = f"training.lr_wsd_decay_{unit}", f"{math.floor(length.decay - length.warmup)}"
    elif training.lr_warmup_fraction is not None:
        share = math.floor(100 * (length.decay - decay) / length.decay) / 100
        where, most = "training.lr_warmup_fraction", f"{share:g}"
    else:
        where, most = f"training.lr_warmup_{unit}", f"{length.decay - decay}"
    names = (f"decay_{unit}", f"warmup_{unit}", f"wsd_decay_{unit}", "warmup_fraction", "decay_style")
    reads = (*_LENGTHS, *(f"training.lr_{name}" for name in names))
    yield problem(config, where, rule, f"set it to {most} or less, or train longer", *reads)


def phases_follow_one_another(config: RunConfig) -> Iterator[Problem]:
    training, where = config.megatron_ds.training, "training.lr_phases"
    found = phases(training)
    if any(later.until <= earlier.until for earlier, later in itertools.pairwise(found)):
        yield problem(config, where, "every phase must end at more tokens than the one before", "put them in order")
    if any(phase.style == "exponential" and not phase.lr for phase in found):
        fix = "give it a learning rate > 0, or make it linear"
        yield problem(config, where, "an exponential decay never reaches 0", fix)


def phases_begin_after_the_warmup(config: RunConfig, world_size: int) -> Iterator[Problem]:
    ours, batch = config.megatron_ds, _batch(config, world_size)
    found = phases(ours.training)
    if batch is None or not found:
        return
    plan = batch_plan(ours.training, batch.train, ours.model.seq_length)
    warm = warmup_tokens(ours.training, plan, ours.model.seq_length)
    if found[0].until <= warm:
        rule = f"the first phase must end after the warmup, which takes {warm} tokens"
        reads = (*_LENGTHS, *_BATCH, _RAMP, _STEPS, "model.seq_length", *(f"training.lr_{name}" for name in _WARMUP))
        yield problem(config, "training.lr_phases", rule, "let it end later, or shorten the warmup", *reads)


def phases_replace_the_decay(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    if not training.lr_phases:
        return
    for name, unused in (("min_lr", 0.0), ("lr_decay_iters", None), ("lr_decay_samples", None)):
        if getattr(training, name) != unused and not (unused is None and training.lr_warmup_fraction is not None):
            rule = "has no effect, since lr_phases say how the learning rate falls"
            yield problem(config, f"training.{name}", rule, "leave it out", "training.lr_phases")


SCHEDULE_RULES = (
    schedules_go_forward,
    the_batch_grows_in_one_way,
    lengths_have_one_unit,
    warmup_is_given_once,
    phases_fit_the_schedule,
    phases_follow_one_another,
    phases_replace_the_decay,
)
SCHEDULE_WORLD_RULES = (
    the_batch_grows_to_its_full_size,
    batches_on_the_way_are_whole,
    the_length_is_given_once,
    learning_rates_fall,
    phases_begin_after_the_warmup,
)
