"""The training model rebuilt from a checkpoint, in one process: what an export is compared with."""

import torch
from pydantic import ValidationError

from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.schema import ModelConfig, RunConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.model.decoder import Decoder


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


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, in the order of the layers; allocates nothing."""
    with torch.device("meta"):
        decoder = Decoder(model)
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


def check_parameters(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """``parameter_shapes(model)``, once the checkpoint is known to hold exactly these; CheckpointError if not."""
    expected = parameter_shapes(model)
    held = {name: tuple(shape) for name, shape in checkpoint.shapes("weight").items()}
    problems = [f"{name} is missing" for name in expected if name not in held]
    problems += [f"{name} is unknown to the model" for name in held if name not in expected]
    problems += [
        f"{name} is {list(held[name])}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in held and held[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.path}: does not hold the model of its own config: {'; '.join(problems)}")
    return expected


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint, rounding: torch.dtype | None = None) -> Decoder:
    """The model in fp32 and evaluation mode, filled from the checkpoint tensor by tensor.

    With ``rounding`` each weight is cast to that dtype and back: the values that an export in that dtype holds.
    Raises CheckpointError when the checkpoint's tensors are not the model's.
    """
    model = read_config(checkpoint).megatron_ds.model
    check_parameters(checkpoint, model)
    decoder = Decoder(model)
    for name, parameter in decoder.named_parameters():
        weight = checkpoint.read(name)
        parameter.copy_(weight if rounding is None else weight.to(rounding))
    return decoder.eval()
