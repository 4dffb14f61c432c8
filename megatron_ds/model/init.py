"""Initial weights: every parameter from its own generator, seeded by (seed, logical name).

So the values depend on no topology, device or construction order: a pipeline stage that owns some of the layers fills
them with exactly what a single process would, and a rank that owns a part of a weight takes it out of the whole.
Experts are drawn one by one, seeded by their global number too, so that a rank draws its own and no others. The rules
are a table; docs/model.md explains the deviations.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.parallel.random import derive_seed
from megatron_ds.parallel.shard import box_of, full_shape

Shape = tuple[int, ...]


@torch.no_grad()
def initialize(named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, seed: int) -> None:
    """Fill parameters in place.

    Args:
        named_parameters: logical names ("layers.0.mlp.up.weight") and the tensors, all of the model or some; one that
            is tagged with ``Shard``s gets its part of the whole.
        config: the model the names belong to.
        seed: the run's seed.
    """
    for name, parameter in named_parameters:
        rule, shape = _rule(name), full_shape(parameter)
        box = tuple(slice(begin, end) for begin, end in box_of(parameter))
        if not _ends_with(name, STACKED):
            parameter.copy_(rule(shape, config, _generator(seed, name))[box])
            continue
        for part, index in zip(parameter, range(shape[0])[box[0]], strict=True):
            part.copy_(rule(shape[1:], config, _generator(seed, name, index))[box[1:]])


def _generator(*identity: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*identity))


def _ends_with(name: str, suffixes: Iterable[str]) -> str | None:
    """The first suffix, in whole components, that a logical name has."""
    return next((suffix for suffix in suffixes if f".{name}".endswith(f".{suffix}")), None)


def _rule(name: str) -> Callable[..., Tensor]:
    suffix = _ends_with(name, RULES)
    assert suffix, f"no initialisation rule for parameter {name}"
    return RULES[suffix]


def _normal(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).mul_(config.init_method_std)


def _residual(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Scaled down by the number of blocks that add into the residual stream: two per layer, not counting MTP's."""
    return _normal(shape, config, generator).div_(math.sqrt(2 * config.num_layers))


def _small(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A tenth of the router's: at first the second stage changes the order of close candidates only."""
    return _normal(shape, config, generator).div_(10)


def _vocabulary(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One row per token; the rows that pad the vocabulary are zero."""
    rows_VD = torch.zeros(shape)
    rows_VD[: config.vocab_size] = _normal((config.vocab_size, shape[1]), config, generator)
    return rows_VD


def _ones(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _initial_gate(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.full(shape, config.attention.initial_gate).logit_()


RULES: dict[str, Callable[..., Tensor]] = {
    "attention.query.weight": _normal,
    "attention.key.weight": _normal,
    "attention.value.weight": _normal,
    "attention.query.bias": _zeros,
    "attention.key.bias": _zeros,
    "attention.value.bias": _zeros,
    "attention.output.weight": _residual,
    "attention.query_down.weight": _normal,
    "attention.query_up.weight": _normal,
    "attention.key_value_down.weight": _normal,
    "attention.key_value_up.weight": _normal,
    "attention.key_value_norm.weight": _ones,
    "attention.query_norm.weight": _ones,
    "attention.key_norm.weight": _ones,
    "attention.far_gate.weight": _zeros,
    "attention.far_gate.bias": _initial_gate,
    "attention_norm.weight": _ones,
    "mlp.gate.weight": _normal,
    "mlp.up.weight": _normal,
    "mlp.down.weight": _residual,
    "mlp.router.weight": _normal,
    "mlp.router.refine": _small,
    "mlp.experts.gate_up": _normal,
    "mlp.experts.down": _residual,
    "mlp.shared.gate.weight": _normal,
    "mlp.shared.up.weight": _normal,
    "mlp.shared.down.weight": _residual,
    "mlp_norm.weight": _ones,
    "embedding_norm.weight": _ones,
    "hidden_norm.weight": _ones,
    "projection.weight": _normal,
    "norm.weight": _ones,
    "embedding.weight": _vocabulary,
    "output.weight": _vocabulary,
}
"""End of the logical name -> rule; the first match holds."""

STACKED = ("mlp.experts.gate_up", "mlp.experts.down")
"""Ends of the names of stacks along their first dimension: [E, 2, F, D] and [E, D, F], drawn expert by expert."""
