"""The training model rebuilt from a checkpoint, in one process: what an export is compared with."""

from collections.abc import Callable

import torch
from pydantic import ValidationError

from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.model.decoder import Decoder

MAX_PROBLEMS = 3
"""Tensors that one message names."""


def read_config(checkpoint: Checkpoint) -> RunConfig:
    """The run's resolved configuration; CheckpointError when this version does not understand it."""
    try:
        return RunConfig.model_validate(checkpoint.config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{checkpoint.path}: config.json, {place}: {first['msg']}; written by another version of megatron_ds"
        ) from error


def tensor_shapes(model: ModelConfig, moe: MoEConfig | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that a checkpoint stores of the model: parameters and persistent buffers.

    In the order of the layers; allocates nothing.
    """
    with torch.device("meta"):
        decoder = Decoder(model, moe)
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def check_tensors(checkpoint: Checkpoint, model: ModelConfig, moe: MoEConfig | None) -> dict[str, tuple[int, ...]]:
    """``tensor_shapes`` of the model, once the checkpoint is known to hold exactly these; CheckpointError if not."""
    expected = tensor_shapes(model, moe)
    held = {name: tuple(shape) for name, shape in checkpoint.shapes("weight").items()}
    problems = [f"{name} is missing" for name in expected if name not in held]
    problems += [f"{name} is unknown to the model" for name in held if name not in expected]
    problems += [
        f"{name} is {list(held[name])}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in held and held[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise CheckpointError(
            f"{checkpoint.path}: does not hold the configured model: {'; '.join(problems[:MAX_PROBLEMS])}{more}; "
            f"its config.json has the settings of the model that it holds"
        )
    return expected


@torch.no_grad()
def load_decoder(
    checkpoint: Checkpoint, rounding: Callable[[str], torch.dtype] = lambda name: torch.float32
) -> Decoder:
    """The model in fp32 and evaluation mode, filled from the checkpoint tensor by tensor.

    Each tensor is cast to ``rounding(name)`` and back: the values that an export in these dtypes holds. Raises
    CheckpointError when the checkpoint's tensors are not the model's.
    """
    run = read_config(checkpoint).megatron_ds
    check_tensors(checkpoint, run.model, run.moe)
    decoder = Decoder(run.model, run.moe)
    for name, tensor in decoder.state_dict().items():
        tensor.copy_(checkpoint.read(name).to(rounding(name)))
    return decoder.eval()
