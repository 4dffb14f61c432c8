"""A Hugging Face directory becomes a checkpoint of step 0: what an export was, and everything else can begin with.

Weights go from file to file in stretches, so that memory does not grow with the model; config.json is a complete
configuration whose model is the directory's. The tokenizer comes along when it is one that we can read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess
from megatron_ds.config.resolve import resolve
from megatron_ds.config.schema import RunConfig
from megatron_ds.data.tokenizer import kept_files
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.hf.plan import ROUNDED, inside_layer
from megatron_ds.hf.reader import HuggingFaceModel, HuggingFaceWeights, open_hugging_face
from megatron_ds.hf.tokenizer_files import TokenizerFiles
from megatron_ds.parallel.random import generator_state

STRETCH = 16 << 20
"""Elements that are read at once."""
MIN_FILE_BYTES, NUM_FILES = 256 << 20, 64
"""A file of the checkpoint is in memory twice while it is written: small ones, but about 64 at most."""

TRAINER = {
    "step": 0,
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "train_loss": None,
    "eval": {},
    "engine": {"global_steps": 0, "skipped_steps": 0, "optimizer": {}, "loss_scaler": {}},
    "wandb_run_id": None,
}
"""The trainer's state before the first step."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    model_type: str
    path: Path
    """Directory of the step."""
    parameters: int
    """Elements of all tensors, the padding of the vocabulary included."""
    notes: list[str]
    """What was passed over, one line each."""


def import_model(directory: Path, output: Path, tokenizer: Path | None = None) -> Imported:
    """Write the checkpoint ``output/global_step0``.

    Args:
        directory: the Hugging Face model.
        output: a new directory.
        tokenizer: a tokenizer directory; by default the model's own, which is left out when it cannot be read.

    Raises ConfigError when the output exists or the model cannot be ours, CheckpointError when the files do not hold it
    or cannot be written, DataError or ConfigError when the given tokenizer cannot be used.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists; choose another directory")
    opened = open_hugging_face(directory)
    weights = opened.weights(opened.model, opened.moe)
    files, notes = _tokenizer(tokenizer or directory, opened, required=tokenizer is not None)
    numel = sum(prod(shape) for shape in weights.shapes().values())
    store = CheckpointStore(output, SingleProcess(), max(MIN_FILE_BYTES, 4 * numel // NUM_FILES))
    saved = store.save(
        0,
        _stretches(weights, numel),
        rank_state=generator_state(torch.device("cpu")),
        trainer=TRAINER | {ROUNDED: _rounded(opened)},
        config=_config(opened, files).model_dump(mode="json"),
        extra_files=kept_files(files.directory if files else None),
    )
    return Imported(opened.sections.target.model_type, saved.path, numel, weights.notes + notes)


def _stretches(weights: HuggingFaceWeights, numel: int) -> Iterator[Fragment]:
    """All weights, in fp32 and in parts of bounded size."""
    with tqdm(total=numel, unit=" weights", unit_scale=True, desc="import", disable=None) as progress:
        for name, shape in weights.shapes().items():
            box = whole(shape)
            for start in range(0, prod(shape), STRETCH):
                values = weights.read_range(name, "weight", box, start, min(STRETCH, prod(shape) - start))
                yield Fragment(name, "weight", shape, box, start, values)
                progress.update(values.numel())


def _rounded(opened: HuggingFaceModel) -> list[str]:
    """What the family keeps in fp32 and the files have in fewer bits: an export of the same weights has it so, too."""
    kept = opened.sections.target.kept_fp32
    return sorted(
        {
            inside_layer(name)
            for name, entries in opened.entries.items()
            if inside_layer(name) in kept and opened.stored[entries[0].name].dtype != torch.float32
        }
    )


def _tokenizer(directory: Path, opened: HuggingFaceModel, *, required: bool) -> tuple[TokenizerFiles | None, list[str]]:
    """The tokenizer of a directory, or a line that says why there is none."""
    try:
        return TokenizerFiles(directory, opened.model.vocab_size, None), []
    except (DataError, ConfigError) as error:
        if required:
            raise
        return None, [f"without a tokenizer: {error}"]


def _config(opened: HuggingFaceModel, files: TokenizerFiles | None) -> RunConfig:
    """A configuration whose model is the directory's, in the precision of its files, and with defaults elsewhere."""
    sections, eod_id = opened.sections, files.eod_id if files else opened.sections.eos
    if eod_id is None:
        where = sections.path / "config.json"
        raise ConfigError(f"{where}: has no eos_token_id, and there is no tokenizer to name one; give --tokenizer DIR")
    model = opened.model.model_copy(update={"seq_length": min(opened.model.seq_length, opened.model.max_positions)})
    tree: dict[str, Any] = {
        "megatron_ds": {
            **sections.tree,
            "model": model.model_dump(mode="json"),
            "data": {"eod_id": eod_id},
        },
    }
    if sections.precision != "fp32":
        tree[sections.precision] = {"enabled": True}
    return resolve(RunConfig.model_validate(tree), world_size=1, name=sections.path.resolve().name)
