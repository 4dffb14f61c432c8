"""Rules of batch, schedule and data, in the form that ``rules.py`` describes."""

import math
from collections.abc import Iterator

from megatron_ds.config.blend import SET_NAME, parse_blend, parse_split
from megatron_ds.config.problems import Problem, problem
from megatron_ds.config.resolve import Batch, complete_batch, data_parallel_size, peak_lr
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import full_path
from megatron_ds.errors import ConfigError

_EVAL_SETS = full_path(("data", "eval_data_path"))
_BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "parallel.pipeline_model_parallel_size",
    "parallel.tensor_model_parallel_size",
)


# --- batch and schedule ---------------------------------------------------------------------------------------------


def batch_sizes_fit(config: RunConfig, world_size: int) -> Iterator[Problem]:
    ranks = data_parallel_size(config, world_size)
    batch = complete_batch(config, ranks) if ranks is not None else None
    if isinstance(batch, Problem):
        yield batch


def learning_rates_fall(config: RunConfig, world_size: int) -> Iterator[Problem]:
    training = config.megatron_ds.training
    ranks = data_parallel_size(config, world_size)
    batch = complete_batch(config, ranks) if ranks is not None else None
    if not isinstance(batch, Batch):
        return
    peak = peak_lr(config, batch.train)
    automatic = config.optimizer.params.lr == "auto"
    source = f'{peak:g} ("auto" at a global batch of {batch.train})' if automatic else f"{peak:g}"
    reads = ("optimizer.params.lr", *(_BATCH if automatic else ()))
    for name, value in (("min_lr", training.min_lr), ("lr_warmup_init", training.lr_warmup_init)):
        if value > peak:
            rule = f"must not exceed the peak learning rate {source}"
            yield problem(config, f"training.{name}", rule, f"set it to {peak:g} or less", *reads)


def warmup_is_given_once(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    if training.lr_warmup_iters is not None and training.lr_warmup_fraction is not None:
        rule = f"lr_warmup_iters {training.lr_warmup_iters} is given too"
        fix = "set one of the two to null (--lr-warmup-fraction none)"
        yield problem(config, "training.lr_warmup_fraction", rule, fix, "training.lr_warmup_iters")


def phases_fit_the_schedule(config: RunConfig) -> Iterator[Problem]:
    training = config.megatron_ds.training
    total = training.lr_decay_iters or training.train_iters
    share, style = training.lr_warmup_fraction, training.lr_decay_style
    warmup = share * total if share is not None else training.lr_warmup_iters or 0
    final = training.lr_wsd_decay_iters or math.ceil(total / 10)
    decay = {"constant": 0, "WSD": final}.get(style, 1)
    if warmup + decay <= total:
        return
    rule = f"{warmup:g} steps of warmup and {decay} of {style} decay do not fit into {total} steps"
    reads = ("training.lr_decay_style", "training.lr_decay_iters", "training.train_iters")
    if style == "WSD" and training.lr_wsd_decay_iters is not None and warmup < total:
        where, most = "training.lr_wsd_decay_iters", f"{math.floor(total - warmup)}"
    elif share is not None:
        where, most = "training.lr_warmup_fraction", f"{math.floor(100 * (total - decay) / total) / 100:g}"
    else:
        where, most = "training.lr_warmup_iters", f"{total - decay}"
    others = ("training.lr_warmup_fraction", "training.lr_warmup_iters", "training.lr_wsd_decay_iters")
    yield problem(config, where, rule, f"set it to {most} or less, or train longer", *reads, *others)


# --- data -----------------------------------------------------------------------------------------------------------


def vocabulary_is_known(config: RunConfig) -> Iterator[Problem]:
    data, size = config.megatron_ds.data, config.megatron_ds.model.vocab_size
    reads = ("model.vocab_size", "data.eod_id")
    if data.tokenizer is None and (size is None or data.eod_id is None):
        rule = "the vocabulary and its end-of-document token must be known"
        fix = "give a tokenizer directory, or both model.vocab_size and data.eod_id"
        yield problem(config, "data.tokenizer", rule, fix, *reads)
    if size is not None and data.eod_id is not None and data.eod_id >= size:
        rule = f"must be below model.vocab_size {size}"
        yield problem(config, "data.eod_id", rule, f"choose 0 to {size - 1}", "model.vocab_size")


def there_is_data(config: RunConfig) -> Iterator[Problem]:
    data, training = config.megatron_ds.data, config.megatron_ds.training
    if data.data_path or (training.skip_train and data.eval_data_path):
        return
    fix = "give --data-path PREFIX (megatron-ds prepare-data writes one)"
    yield problem(config, "data.data_path", "a run needs data", fix, "training.skip_train", "data.eval_data_path")


def blends_are_weights_and_prefixes(config: RunConfig) -> Iterator[Problem]:
    data = config.megatron_ds.data
    blends = {(*_EVAL_SETS, name): tokens for name, tokens in data.eval_data_path.items()}
    if data.data_path:
        blends[full_path(("data", "data_path"))] = data.data_path
    for path, tokens in blends.items():
        try:
            parse_blend(tokens)
        except ConfigError as error:
            yield Problem(path, tokens, str(error), "write it like 0.3 a 0.7 b, or prefixes alone", (path,))


def evaluation_sets_have_plain_names(config: RunConfig) -> Iterator[Problem]:
    for name, tokens in config.megatron_ds.data.eval_data_path.items():
        if not SET_NAME.fullmatch(name):
            path = (*_EVAL_SETS, name)
            rule = "the name becomes part of metric names, so it has letters, digits, _ and - only"
            yield Problem(path, tokens, rule, "rename it", (path,))


def split_leaves_training_data(config: RunConfig) -> Iterator[Problem]:
    data, training = config.megatron_ds.data, config.megatron_ds.training
    try:
        train, _, _ = parse_split(data.split)
    except ConfigError as error:
        yield problem(config, "data.split", str(error), 'write it like "969,30,1"')
        return
    if not train and not training.skip_train:
        rule = "leaves no document for training"
        yield problem(config, "data.split", rule, "give the first share a number > 0", "training.skip_train")


TRAINING_RULES = (
    warmup_is_given_once,
    phases_fit_the_schedule,
    vocabulary_is_known,
    there_is_data,
    blends_are_weights_and_prefixes,
    evaluation_sets_have_plain_names,
    split_leaves_training_data,
)
TRAINING_WORLD_RULES = (batch_sizes_fit, learning_rates_fall)
