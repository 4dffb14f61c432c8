"""Initial weights: every parameter from its own generator, seeded by (seed, logical name).

So the values depend on no topology, device or construction order: a pipeline stage that owns some of the layers fills
them with exactly what a single process would. The rules are a table; docs/model.md explains the deviations.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_ds.config.schema import ModelConfig
from megatron_ds.parallel.random import derive_seed


@torch.no_grad()
def initialize(named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, seed: int) -> None:
    """Fill parameters in place.

    Args:
        named_parameters: logical names ("layers.0.mlp.up.weight") and the tensors, all of the model or some.
        config: the model the names belong to.
        seed: the run's seed.
    """
    for name, parameter in named_parameters:
        value = _rule(name)(parameter.shape, config, torch.Generator().manual_seed(derive_seed(seed, name)))
        parameter.copy_(value)


def _rule(name: str) -> Callable[..., Tensor]:
    matches = [rule for suffix, rule in RULES.items() if f".{name}".endswith(f".{suffix}")]
    assert matches, f"no initialisation rule for parameter {name}"
    return matches[0]


def _normal(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).mul_(config.init_method_std)


def _residual(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Scaled down by the number of blocks that add into the residual stream (two per layer)."""
    return _normal(shape, config, generator).div_(math.sqrt(2 * config.num_layers))


def _vocabulary(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One row per token; the rows that pad the vocabulary are zero."""
    rows_VD = torch.zeros(shape)
    rows_VD[: config.vocab_size] = _normal((config.vocab_size, shape[1]), config, generator)
    return rows_VD


def _ones(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _initial_gate(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.full(shape, config.attention.initial_gate).logit_()


RULES: dict[str, Callable[..., Tensor]] = {
    "attention.query.weight": _normal,
    "attention.key.weight": _normal,
    "attention.value.weight": _normal,
    "attention.output.weight": _residual,
    "attention.query_norm.weight": _ones,
    "attention.key_norm.weight": _ones,
    "attention.far_gate.weight": _zeros,
    "attention.far_gate.bias": _initial_gate,
    "attention_norm.weight": _ones,
    "mlp.gate.weight": _normal,
    "mlp.up.weight": _normal,
    "mlp.down.weight": _residual,
    "mlp_norm.weight": _ones,
    "norm.weight": _ones,
    "embedding.weight": _vocabulary,
    "output.weight": _vocabulary,
}
"""End of the logical name -> rule; the first match holds."""
