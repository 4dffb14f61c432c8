"""What a valid configuration leaves open: the third batch size, the automatic learning rate, length, name, vocabulary.

DeepSpeed's batch triangle is train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-
parallel ranks; two of the three keys give the third. ``resolve`` writes what follows from the rest into a new frozen
tree, which loads again to an equal one. Whether the values are possible is asked before, in ``rules.py``.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ds.config.batch_plan import batch_plan
from megatron_ds.config.problems import Problem
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import Path, dotted, flatten, write
from megatron_ds.config.values import show
from megatron_ds.errors import ConfigError

TRAIN = ("train_batch_size",)
MICRO = ("train_micro_batch_size_per_gpu",)
ACCUMULATION = ("gradient_accumulation_steps",)
LR = ("optimizer", "params", "lr")
TRAIN_ITERS = ("megatron_ds", "training", "train_iters")
TRAIN_SAMPLES = ("megatron_ds", "training", "train_samples")
RUN_NAME = ("megatron_ds", "monitor", "run_name")
VOCAB_SIZE = ("megatron_ds", "model", "vocab_size")
EOD_ID = ("megatron_ds", "data", "eod_id")
PIPELINE = ("megatron_ds", "parallel", "pipeline_model_parallel_size")
TENSOR = ("megatron_ds", "parallel", "tensor_model_parallel_size")


@dataclass(frozen=True)
class Batch:
    """The batch triangle, complete."""

    train: int
    """Sequences per optimizer step over all ranks."""
    micro: int
    """Sequences per forward pass and rank."""
    accumulation: int
    """Micro-batches per optimizer step and rank."""


def data_parallel_size(config: RunConfig, world_size: int) -> int | None:
    """Ranks on the data axis; None when the other axes do not divide the world."""
    parallel = config.megatron_ds.parallel
    size, rest = divmod(world_size, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    return size if rest == 0 else None


def complete_batch(config: RunConfig, data_ranks: int) -> Batch | Problem:
    """The batch triangle of a configuration, or why there is none.

    With train_batch_size alone the accumulation is 1, as in DeepSpeed; without it, micro batch and accumulation are 1.
    """
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    if train is None:
        return Batch((micro or 1) * (steps or 1) * data_ranks, micro or 1, steps or 1)
    reads = (TRAIN, MICRO, ACCUMULATION, PIPELINE, TENSOR)
    if micro is not None and steps is not None:
        product = micro * steps * data_ranks
        if train == product:
            return Batch(train, micro, steps)
        rule = f"must be micro batch {micro} x accumulation {steps} x data-parallel ranks {data_ranks} = {product}"
        return Problem(TRAIN, train, rule, f"set it to {product}, or leave one of the three batch keys out", reads)
    if micro is not None:
        unit, words = micro * data_ranks, f"micro batch {micro} x data-parallel ranks {data_ranks}"
    elif steps is not None:
        unit, words = steps * data_ranks, f"accumulation {steps} x data-parallel ranks {data_ranks}"
    else:
        unit, words = data_ranks, "data-parallel ranks"
    third, rest = divmod(train, unit)
    if rest:
        rule = f"must be a multiple of {words} = {unit}"
        return Problem(TRAIN, train, rule, f"set it to {nearest_multiples(train, unit)}", reads)
    return Batch(train, micro, third) if micro else Batch(train, third, steps or 1)


def nearest_multiples(value: int, unit: int, first: int = 0) -> str:
    """``first`` plus the multiples of ``unit`` on both sides of a value, in words: "12 or 24"."""
    below = value // unit * unit
    above = below + unit
    return f"{first + below} or {first + above}" if first + below else f"{above}"


def peak_lr(config: RunConfig, train_batch_size: int) -> float:
    """The learning rate after the warmup; "auto" is 5e-4 x global batch size / 256."""
    lr = config.optimizer.params.lr
    return 5e-4 * train_batch_size / 256 if lr == "auto" else lr


def resolve(config: RunConfig, world_size: int, name: str = "run") -> RunConfig:
    """Fill in everything that follows from the configuration and the number of ranks.

    ``name`` becomes the run's name unless it has one. The rules must hold (``rules.find_broken``).
    """
    data_ranks = data_parallel_size(config, world_size)
    assert data_ranks is not None, "the world is not divisible; rules.py should have said so"
    batch = complete_batch(config, data_ranks)
    assert isinstance(batch, Batch), "the batch sizes do not fit; rules.py should have said so"
    values: dict[Path, Any] = {
        TRAIN: batch.train,
        MICRO: batch.micro,
        ACCUMULATION: batch.accumulation,
        LR: peak_lr(config, batch.train),
        RUN_NAME: config.megatron_ds.monitor.run_name or name,
    }
    training = config.megatron_ds.training
    if training.train_samples is not None:
        plan = batch_plan(training, batch.train, config.megatron_ds.model.seq_length)
        values[TRAIN_ITERS] = plan.steps_within(training.train_samples)
    return with_values(config, values)


def with_vocabulary(config: RunConfig, vocab_size: int, eod_id: int) -> RunConfig:
    """The configuration with the tokenizer's vocabulary size and end-of-document token filled in.

    Values given explicitly stay. Raises ConfigError when the explicit vocabulary is smaller than the tokenizer's, or
    when the end-of-document token lies outside of it.
    """
    given = config.megatron_ds.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"{dotted(VOCAB_SIZE)} = {given}: the tokenizer has {vocab_size} tokens; "
            f"set it to {vocab_size} or more, or leave it out"
        )
    size = given or vocab_size
    eod = config.megatron_ds.data.eod_id
    eod = eod_id if eod is None else eod
    if eod >= size:
        raise ConfigError(f"{dotted(EOD_ID)} = {eod}: must be below the vocabulary size {size}; leave it out")
    return with_values(config, {VOCAB_SIZE: size, EOD_ID: eod})


def with_values(config: RunConfig, values: dict[Path, Any]) -> RunConfig:
    """A copy with some leaves replaced, validated again."""
    tree = config.model_dump(mode="json")
    for path, value in values.items():
        write(tree, path, value)
    return RunConfig.model_validate(tree)


def config_difference(a: RunConfig, b: RunConfig) -> list[str]:
    """The leaves in which two configurations differ, one line each: ``path: old -> new``."""
    old, new = (flatten(config.model_dump(mode="json")) for config in (a, b))
    absent = object()
    lines = []
    for path in (*old, *(path for path in new if path not in old)):
        before, after = old.get(path, absent), new.get(path, absent)
        if before != after:
            words = ["not set" if value is absent else show(value) for value in (before, after)]
            lines.append(f"{dotted(path)}: {words[0]} -> {words[1]}")
    return lines
