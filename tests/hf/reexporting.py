"""From a Hugging Face directory to a checkpoint of ours and back to a directory: what must not change a bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.hf.export import export
from megatron_ds.hf.import_model import import_model
from megatron_ds.hf.options import ExportOptions


def reexport(directory: Path, work: Path, **options) -> Path:
    """Import a directory into a checkpoint under ``work``, export that for the same family and return the new one."""
    imported = import_model(directory, work / "checkpoints")
    export(open_checkpoint(work / "checkpoints"), work / "model", ExportOptions(target=imported.model_type, **options))
    return work / "model"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the files of a directory."""
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names, shapes, number formats and every bit are equal."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )
