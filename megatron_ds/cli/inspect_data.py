"""``megatron-ds inspect-data``: show what a training step saw, or what a corpus holds.

The order of samples is a pure function of seed and position, so the tool needs no record of the run: it computes the
step again. Documents are shown with their borders, and control characters are escaped, since text may hold terminal
commands.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from megatron_ds.config.batch_plan import BatchPlan, batch_plan
from megatron_ds.config.blend import parse_blend, parse_split
from megatron_ds.config.schema import DataConfig, RunConfig
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ds.data.loader import Datasets, TokenDataset
    from megatron_ds.data.samples import Sample, SampleIndex

HELP = "Show what a training step saw, or what a corpus holds."
EXAMPLE = "megatron-ds inspect-data --run runs/v1_tiny --step 100 --limit 2"


@dataclass(frozen=True)
class Settings:
    """What decides which samples a step sees."""

    data: DataConfig
    seq_length: int
    seed: int
    micro_batch_size: int
    batch_plan: BatchPlan
    data_parallel_size: int
    vocab_size: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add, data = parser.add_argument, DataConfig()
    add("--run", type=Path, metavar="DIR", help="run directory; its config.json gives all of the settings below")
    add("--data-path", nargs="+", metavar="WORD", help="prefix, or weights and prefixes: 0.3 a 0.7 b")
    add("--tokenizer", metavar="DIR", help="folder with a tokenizer.json; by default the run's")
    add("--seq-length", type=int, default=2048, help="tokens in a sample (default: %(default)s)")
    add("--split", default=data.split, help="shares of training, validation, test (default: %(default)s)")
    add("--seed", type=int, default=1234, help="seed of the run (default: %(default)s)")
    add("--micro-batch-size", type=int, default=1, help="samples per rank and pass (default: %(default)s)")
    add("--global-batch-size", type=int, default=1, help="samples per step (default: %(default)s)")
    add("--data-parallel-size", type=int, default=1, help="data-parallel ranks (default: %(default)s)")
    add("--step", type=int, metavar="N", help="show the samples of step N, counted from 1; without it, statistics")
    add("--limit", type=int, default=8, help="most samples to show (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the samples of a step, or statistics."""
    settings = _from_run(args.run) if args.run else _from_flags(args)
    if args.step is not None and args.step < 1:
        raise ConfigError(f"--step {args.step}: steps are counted from 1")
    directory = args.tokenizer or settings.data.tokenizer
    if directory is None:
        raise ConfigError("text needs a tokenizer; give --tokenizer DIR")
    tokenizer = Tokenizer.load(directory)
    # Here, since torch takes seconds to import and --help should not.
    from megatron_ds.data.loader import build_datasets

    datasets = build_datasets(
        settings.data,
        seed=settings.seed,
        seq_length=settings.seq_length,
        vocab_size=settings.vocab_size or tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    if args.step is None:
        lines = _statistics(datasets)
    elif datasets.train is None:
        raise ConfigError(f"--split {settings.data.split}: leaves nothing for training, so no step saw anything")
    else:
        lines = _step(datasets.train, settings, args.step, args.limit, tokenizer)
    for line in lines:
        print(line)
    return 0


def _from_flags(args: argparse.Namespace) -> Settings:
    if not args.data_path:
        raise ConfigError("no data; give --run DIR, or --data-path PREFIX")
    for flag, value, grammar in (("--data-path", args.data_path, parse_blend), ("--split", args.split, parse_split)):
        try:
            grammar(value)
        except ConfigError as error:
            raise ConfigError(f"{flag} {value if isinstance(value, str) else ' '.join(value)}: {error}") from error
    for name in ("seq_length", "micro_batch_size", "global_batch_size", "data_parallel_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: must be 0 or more")
    pass_size = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % pass_size:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of micro batch x ranks = {pass_size}"
        )
    return Settings(
        data=DataConfig(data_path=tuple(args.data_path), split=args.split, tokenizer=args.tokenizer),
        seq_length=args.seq_length,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        batch_plan=BatchPlan((0,), (args.global_batch_size,)),
        data_parallel_size=args.data_parallel_size,
        vocab_size=None,
    )


def _from_run(directory: Path) -> Settings:
    path = directory / "config.json"
    try:
        config = RunConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a run directory such as runs/NAME"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{path}: is no resolved configuration ({error.errors()[0]['msg']})") from error
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if not (config.train_batch_size and micro and steps):
        raise ConfigError(f"{path}: is no resolved configuration (its batch sizes are open)")
    ours = config.megatron_ds
    return Settings(
        data=ours.data,
        seq_length=ours.model.seq_length,
        seed=ours.training.seed,
        micro_batch_size=micro,
        batch_plan=batch_plan(ours.training, config.train_batch_size, ours.model.seq_length),
        data_parallel_size=config.train_batch_size // (micro * steps),
        vocab_size=ours.model.vocab_size,
    )


def _step(train: "TokenDataset", settings: Settings, step: int, limit: int, tokenizer: Tokenizer) -> Iterator[str]:
    first = settings.batch_plan.samples_after(step - 1)
    size = settings.batch_plan.at(first)
    yield (
        f"step {step}: samples {first} to {first + size - 1}, micro batch size "
        f"{settings.micro_batch_size}, data-parallel size {settings.data_parallel_size}"
    )
    for number in range(min(limit, size)):
        micro_batch, rank = divmod(number // settings.micro_batch_size, settings.data_parallel_size)
        yield f"\nsample {first + number}: micro-batch {micro_batch} of data rank {rank}"
        yield from _sample(train[first + number], train, tokenizer)
    if (hidden := size - limit) > 0:
        yield f"\n{hidden} more samples; show them with --limit {size}"


def _sample(sample: "Sample", train: "TokenDataset", tokenizer: Tokenizer) -> Iterator[str]:
    lengths = {index.dataset.prefix: np.diff(index.dataset.document_offsets) for index in train.indices}
    start = 0
    for span in sample.where:
        yield (
            f"  -- {sample.source} document {span.document}, tokens {span.offset} to {span.offset + span.length - 1} "
            f"of {lengths[sample.source][span.document]}"
        )
        text = tokenizer.decode(sample.token_S1[start : start + span.length])
        start += span.length
        yield from (f"  | {escape(line)}" for line in text.split("\n"))


def escape(text: str) -> str:
    """The text with everything but printable characters spelled out, as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _statistics(datasets: "Datasets") -> Iterator[str]:
    sets = {"train": datasets.train, **datasets.eval, "test": datasets.test}
    known: set[str] = set()
    for name, dataset in sets.items():
        if dataset is None:
            yield f"{name}: no documents"
            continue
        size = "endless" if dataset.num_samples is None else f"{dataset.num_samples:,} samples"
        yield f"{name}: {size}, {dataset.seq_length} tokens each"
        for index, share in zip(dataset.indices, dataset.blend.shares):
            if index.dataset.prefix not in known:
                yield from _corpus(index)
                known.add(index.dataset.prefix)
            yield (
                f"  {100 * share:.4g} % {index.dataset.prefix}: documents {index.documents.start:,} to "
                f"{index.documents.stop - 1:,}, {index.num_tokens:,} tokens, {len(index):,} samples per epoch"
            )


def _corpus(index: "SampleIndex") -> Iterator[str]:
    dataset = index.dataset
    lengths = np.diff(dataset.document_offsets)
    yield (
        f"  {dataset.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} {dataset.dtype.name} tokens, "
        f"{lengths.min():,} to {lengths.max():,} per document, median {int(np.median(lengths)):,}"
    )
    if dataset.text_bytes is not None:
        total = int(dataset.text_bytes.sum())
        yield f"  {dataset.prefix}: {total:,} bytes of text, {total / dataset.num_tokens:.3f} bytes/token"
