"""The mean of several checkpoints' weights, as a checkpoint of weights alone.

Averaging the last steps of a run often evaluates better than the last step, and costs no training. Sums are in fp64, a
block of a tensor at a time, so any number of the largest models fits in little memory; the layouts that wrote them may
differ. Optimizer and random states have no mean that means anything: the result is to be exported, or begun with.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_ds.checkpoint.listing import AVERAGED
from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.store import CheckpointStore, SaveReport, SingleProcess
from megatron_ds.errors import CheckpointError, ConfigError

BLOCK = 1 << 22
"""Elements that are summed at a time."""
MAX_FILE_BYTES = 1 << 30
"""Of a shard; it is in memory until it is written."""
TOKENIZER = "tokenizer"


def average(checkpoints: list[Checkpoint], output: Path) -> SaveReport:
    """Write the mean of the weights of ``checkpoints``, fp32, as the newest one's step into the new ``output``.

    Configuration, tokenizer and counters are the newest one's; losses are not those of any of them, and left out.
    Raises CheckpointError when they do not hold the same tensors, or it cannot be written; ConfigError when ``output``
    is not empty.
    """
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    for other in checkpoints:
        if other.shapes() != newest.shapes():
            raise CheckpointError(f"{other.path} and {newest.path} hold different models; give checkpoints of one run")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists and is not empty; name a new directory")
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    kept = {key: newest.trainer[key] for key in ("consumed_samples", "consumed_tokens") if key in newest.trainer}
    tokenizer = newest.path / TOKENIZER
    return CheckpointStore(output, SingleProcess(), MAX_FILE_BYTES).save(
        newest.step,
        _means(checkpoints, newest.shapes()),
        rank_state={},
        trainer={"step": newest.step, **kept, "train_loss": None, "eval": {}, AVERAGED: steps},
        config=newest.config,
        extra_files={TOKENIZER: tokenizer} if tokenizer.is_dir() else None,
    )


def _means(checkpoints: list[Checkpoint], shapes: dict[str, tuple[int, ...]]) -> Iterator[Fragment]:
    total = sum(map(prod, shapes.values()))
    with tqdm(total=total, desc="average", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        for name, shape in shapes.items():
            for start in range(0, prod(shape), BLOCK) or [0]:
                length = min(BLOCK, prod(shape) - start)
                mean_N = torch.zeros(length, dtype=torch.float64)
                for checkpoint in checkpoints:
                    mean_N += checkpoint.read_range(name, "weight", whole(shape), start, length)
                mean_N /= len(checkpoints)
                yield Fragment(name, "weight", shape, whole(shape), start, mean_N.float())
                bar.update(length)
