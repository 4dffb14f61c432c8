"""Rotary position embedding: frequencies with their context extensions, fp32 tables, and the rotation itself.

Two channels of a head form a pair that turns by position * frequency[c]: channels c and c + K/2 (half-split, as in
Hugging Face's rotate_half), or neighbours 2c and 2c + 1 (interleaved, as in ERNIE and DeepSeek). The families round in
their own ways, and so does each here: half-split rotates in the dtype of x, interleaved in fp32. A context extension
only changes the frequencies (and, for YaRN, the length of the vectors), so the kinds differ in one function each.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ds.config.model_schema import DefaultRope, LinearRope, Llama3Rope, ModelConfig, RopeScaling, YarnRope

Pairs = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The first and the second channels of all pairs, as views."""


def rotary_tables(config: ModelConfig, position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, fp32 [B, S, K/2]; YaRN's attention factor is included."""
    frequency, factor = frequencies(config)
    angle_BSK = position_BS[..., None].float() * frequency.to(position_BS.device)
    return angle_BSK.cos() * factor, angle_BSK.sin() * factor


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each of the K/2 channel pairs that turn, and the multiplier of cos and sin.

    Every operation is rounded as in Hugging Face's modeling_rope_utils.py: one unit in the last place of a frequency
    is 1e-4 of angle at position 2000.
    """
    period = config.rotary_base ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    return SCALING[type(config.rope_scaling)](period, config.rope_scaling, config)


def score_growth(config: ModelConfig) -> float:
    """Factor on the scores of latent attention beside 1 / sqrt(K): YaRN's m(mscale_all_dim)^2, else 1.

    It grows those of the channels without a position, too, which the tables do not reach.
    """
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRope) or not scaling.mscale_all_dim:
        return 1.0
    return _yarn_growth(scaling, scaling.mscale_all_dim) ** 2


def rotate(x_BSHK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor, interleaved: bool = False) -> Tensor:
    """Turn every head by its position's angles.

    Args:
        x_BSHK: queries or keys, any strides.
        cos_BSK, sin_BSK: fp32 tables of K/2 angles, see ``rotary_tables``.
        interleaved: pair channels 2c and 2c + 1 and rotate in fp32, instead of c and c + K/2 in the dtype of x.

    Returns:
        x_BHSK, contiguous, in the dtype of x: the layout in which attention reads it.
    """
    if interleaved:
        return _Rotate.apply(x_BSHK.float(), cos_BSK, sin_BSK, _neighbours).to(x_BSHK.dtype)
    return _Rotate.apply(x_BSHK, cos_BSK.to(x_BSHK.dtype), sin_BSK.to(x_BSHK.dtype), _halves)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, -1)


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


class _Rotate(torch.autograd.Function):
    """The backward pass of a rotation is the rotation by the opposite angle, so no input is kept."""

    @staticmethod
    def forward(ctx, x_BSHK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(cos_BSK, sin_BSK)
        ctx.pairs = pairs
        x_BHSK = x_BSHK.transpose(1, 2)
        y_BHSK = torch.empty_like(x_BHSK, memory_format=torch.contiguous_format)
        return _turn(x_BHSK, cos_BSK.unsqueeze(1), sin_BSK.unsqueeze(1), y_BHSK, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHSK: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BSK, sin_BSK = ctx.saved_tensors
        grad_BSHK = grad_BHSK.transpose(1, 2)
        grad_x_BSHK = torch.empty_like(grad_BSHK, memory_format=torch.contiguous_format)
        _turn(grad_BSHK, cos_BSK.unsqueeze(2), sin_BSK.neg().unsqueeze(2), grad_x_BSHK, ctx.pairs)
        return grad_x_BSHK, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, pairs: Pairs) -> Tensor:
    (first, second), (out_first, out_second) = pairs(x), pairs(out)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def _default(period: Tensor, scaling: DefaultRope, config: ModelConfig) -> tuple[Tensor, float]:
    return 1.0 / period, 1.0


def _linear(period: Tensor, scaling: LinearRope, config: ModelConfig) -> tuple[Tensor, float]:
    return 1.0 / period / scaling.factor, 1.0


def _llama3(period: Tensor, scaling: Llama3Rope, config: ModelConfig) -> tuple[Tensor, float]:
    """Keep frequencies that turn often within the original context, interpolate slow ones, blend between the two."""
    frequency = 1.0 / period
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequency)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - kept) * frequency / scaling.factor + kept * frequency
    return blended.where(kept > 0, frequency / scaling.factor).where(kept < 1, frequency), 1.0


def _yarn(period: Tensor, scaling: YarnRope, config: ModelConfig) -> tuple[Tensor, float]:
    """Blend from kept to interpolated over the channels between beta_fast and beta_slow turns (arXiv 2309.00071)."""

    def channel(turns: float) -> float:
        """The channel pair that turns this often within the original context."""
        base_turns = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.rotary_dim * math.log(base_turns) / (2 * math.log(config.rotary_base))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), config.rotary_dim - 1)
    ramp = (torch.arange(len(period), dtype=torch.float32) - low) / max(high - low, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * period) * (1 - kept) + 1.0 / period * kept, _yarn_length(scaling)


def _yarn_length(scaling: YarnRope) -> float:
    """Multiplier of cos and sin. Like transformers, a pair of mscales of which one is 0 counts as not given."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_growth(scaling, scaling.mscale) / _yarn_growth(scaling, scaling.mscale_all_dim)
    return _yarn_growth(scaling, 1.0)


def _yarn_growth(scaling: YarnRope, mscale: float) -> float:
    """m(mscale): how much larger scores should be in the longer context, once for queries and once for keys."""
    return 0.1 * mscale * math.log(scaling.factor) + 1.0


SCALING: dict[type[RopeScaling], Callable[[Tensor, RopeScaling, ModelConfig], tuple[Tensor, float]]] = {
    DefaultRope: _default,
    LinearRope: _linear,
    Llama3Rope: _llama3,
    YarnRope: _yarn,
}
"""Kind of context extension -> function from base^(2c/K) to (frequencies, multiplier of cos and sin)."""
