"""Random numbers as a pure function of where they are used, so that no topology, resume or recompute changes them.

A seed is derived from what identifies the use (run seed, step, micro-batch, layer, parameter name) by a hash, and the
generator is seeded right there. No generator state has to travel, be saved or be put back.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.parallel.tensor import TensorRanks


def derive_seed(*identity: int | str) -> int:
    """A 63-bit seed from the parts that identify one use of randomness, e.g. ``derive_seed(seed, "norm.weight")``."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout masks of one micro-batch.

    Args:
        seed: the run's seed.
        step: optimizer step.
        micro_batch: index of the micro-batch in the global batch, over all data-parallel ranks.
    """
    return derive_seed(seed, "dropout", step, micro_batch)


def seed_default_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout on ``device`` draws from."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def dropout(x_BSD: Tensor, probability: float, tensor: TensorRanks) -> Tensor:
    """Dropout between tensor-parallel regions, from the device's default generator, which all ranks seeded equally.

    A rank that has a stretch of the sequence takes that stretch of the mask which one process would draw.
    """
    if not tensor.splits_sequence:
        return F.dropout(x_BSD, probability)
    batch, stretch, width = x_BSD.shape
    mask_BSD = F.dropout(x_BSD.new_ones(batch, tensor.size * stretch, width), probability)
    return x_BSD * tensor.stretch(mask_BSD)


def generator_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the default generators. The framework derives all it draws; this is for users' code that does not."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_generator_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what ``generator_state`` returned; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
