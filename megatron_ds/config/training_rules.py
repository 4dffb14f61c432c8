"""Rules of batch and data, in the form that ``rules.py`` describes; those of schedules are in ``schedule_rules.py``."""

from collections.abc import Iterator

from megatron_ds.config.blend import SET_NAME, parse_blend, parse_split
from megatron_ds.config.problems import Problem, problem
from megatron_ds.config.resolve import complete_batch, data_parallel_size
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import full_path
from megatron_ds.errors import ConfigError

_EVAL_SETS = full_path(("data", "eval_data_path"))

# --- batch ---------------------------------------------------------------------------------------------


def batch_sizes_fit(config: RunConfig, world_size: int) -> Iterator[Problem]:
    ranks = data_parallel_size(config, world_size)
    batch = complete_batch(config, ranks) if ranks is not None else None
    if isinstance(batch, Problem):
        yield batch


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


def finetuning_begins_with_weights(config: RunConfig) -> Iterator[Problem]:
    checkpoint = config.megatron_ds.checkpoint
    if checkpoint.finetune and checkpoint.load is None:
        yield problem(config, "checkpoint.finetune", "needs weights to begin with", "give --load", "checkpoint.load")


def local_checkpoints_have_place_and_interval(config: RunConfig) -> Iterator[Problem]:
    checkpoint = config.megatron_ds.checkpoint
    for given, needed, fix in (
        ("local_save", "local_save_interval", "say how often with --local-save-interval"),
        ("local_save_interval", "local_save", "say where with --local-save DIR, on a disk of the node"),
        ("local_save_neighbour", "local_save", "say where with --local-save DIR, on a disk of the node"),
    ):
        if getattr(checkpoint, given) and getattr(checkpoint, needed) is None:
            path = f"checkpoint.{given}"
            yield problem(config, path, f"needs checkpoint.{needed}", fix, f"checkpoint.{needed}")


def retention_has_a_number(config: RunConfig) -> Iterator[Problem]:
    checkpoint = config.megatron_ds.checkpoint
    for name in ("save_retain_interval", "keep_best"):
        if getattr(checkpoint, name) and checkpoint.keep_last is None:
            rule = "says what else to keep, and without checkpoint.keep_last everything is kept"
            yield problem(config, f"checkpoint.{name}", rule, "set --keep-last", "checkpoint.keep_last")


def the_best_is_measured(config: RunConfig) -> Iterator[Problem]:
    checkpoint, training = config.megatron_ds.checkpoint, config.megatron_ds.training
    for name, chosen in (("keep_best", checkpoint.keep_best), ("save_hf", checkpoint.save_hf == "best")):
        if chosen and training.eval_interval is None:
            rule, fix = "the best checkpoint is found by its validation loss", "set --eval-interval"
            yield problem(config, f"checkpoint.{name}", rule, fix, "training.eval_interval")


TRAINING_RULES = (
    finetuning_begins_with_weights,
    local_checkpoints_have_place_and_interval,
    retention_has_a_number,
    the_best_is_measured,
    vocabulary_is_known,
    there_is_data,
    blends_are_weights_and_prefixes,
    evaluation_sets_have_plain_names,
    split_leaves_training_data,
)
TRAINING_WORLD_RULES = (batch_sizes_fit,)
