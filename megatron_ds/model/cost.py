"""What a model costs: parameters, FLOPs per token under two conventions, and what share of a device's peak that is.

Closed formulas (docs/model.md), no model is built. *causal* counts each visible query-key pair once, forward and twice
backward: the FLOPs that the model needs, and the ones of MFU. *executed* counts the products that this implementation
runs on a CPU, masked pairs of a tile and the recomputed scores included: what ``torch.utils.flop_counter`` measures.
Neither counts activation recompute. Of a mixture of experts a token multiplies the router and its own experts, none of
which drops it.
"""

import time
from typing import Literal

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from megatron_ds.config.model_schema import HybridAttention, ModelConfig, SoftGateAttention
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.attention_mask import first_keys, key_ranges
from megatron_ds.parallel.linear import linear

Convention = Literal["causal", "executed"]

DEVICE_PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "H200": 989.5e12,
    "GH200": 989.5e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
"""Part of the device's name -> dense bf16 FLOP/s by the vendor's data sheet; the longest part that matches holds."""


if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _grouped_flop(a_shape, b_shape, *args, **kwargs) -> int:
        """Rows times the matrix of their group, or (both 2-D) an outer product per group: every row in one group."""
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def parameter_counts(config: ModelConfig, moe: MoEConfig | None = None) -> dict[str, int]:
    """Parameters by part of the model; ``output`` is 0 when tied to the embedding, the parts of experts without any.

    ``mlp`` are the dense feed-forward blocks, ``experts`` the routed ones.
    """
    width, head_dim = config.hidden_size, config.head_dim
    vocabulary = config.padded_vocab_size * width
    gate_bias = config.num_attention_heads if isinstance(config.attention, SoftGateAttention) else 0
    qk_norm = 2 * head_dim if config.qk_layernorm else 0
    sparse = _num_sparse_layers(config, moe)
    return {
        "embedding": vocabulary,
        "attention": config.num_layers * (_attention_weights(config) + gate_bias + qk_norm),
        "mlp": (config.num_layers - sparse) * _mlp_weights(config, config.ffn_size),
        "router": sparse * _router_weights(config, moe) if moe else 0,
        "experts": sparse * moe.num_experts * _expert_weights(config, moe) if moe else 0,
        "shared": sparse * _shared_weights(config, moe) if moe else 0,
        "norm": (2 * config.num_layers + 1) * width,
        "output": vocabulary if config.untie_embeddings_and_output_weights else 0,
    }


def num_parameters(config: ModelConfig, moe: MoEConfig | None = None) -> int:
    """Parameters of the whole model, padding of the vocabulary included."""
    return sum(parameter_counts(config, moe).values())


def active_parameters(config: ModelConfig, moe: MoEConfig | None = None) -> int:
    """Parameters that take part in one token: all but the routed experts that it does not go to.

    The input embedding counts; some publications leave it out, ``parameter_counts`` has its size.
    """
    idle = 0
    if moe:
        idle = parameter_counts(config, moe)["experts"] // moe.num_experts * (moe.num_experts - moe.moe_router_topk)
    return num_parameters(config, moe) - idle


def flops_per_token(
    config: ModelConfig,
    moe: MoEConfig | None = None,
    *,
    seq_length: int | None = None,
    convention: Convention = "causal",
) -> float:
    """Training FLOPs (forward and backward) per token of single-document samples.

    Args:
        config: the model; the padded vocabulary is counted, since it is multiplied.
        moe: its experts, None for a dense model.
        seq_length: tokens in a sample, by default the configured one.
        convention: see the module's docstring.
    """
    return sum(layer_costs(config, moe, seq_length=seq_length, convention=convention))


def layer_costs(
    config: ModelConfig,
    moe: MoEConfig | None = None,
    *,
    seq_length: int | None = None,
    convention: Convention = "causal",
) -> list[float]:
    """``flops_per_token`` of each entry of ``decoder.layer_list``."""
    seq_length = seq_length or config.seq_length
    layers = [
        6 * (_attention_weights(config) + _feed_forward_weights(config, moe, index))
        + sum(_core_flops(config, seq_length, window, convention) for window in _windows(config, index))
        for index in range(config.num_layers)
    ]
    return [0.0, *layers, 0.0, 6.0 * config.padded_vocab_size * config.hidden_size]


def mfu(tokens_per_second_per_device: float, config: ModelConfig, peak: float, moe: MoEConfig | None = None) -> float:
    """Model FLOPs utilisation: the share of ``peak`` FLOP/s that the *causal* FLOPs of this throughput are."""
    return tokens_per_second_per_device * flops_per_token(config, moe) / peak


def device_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (``torch.cuda.get_device_name()``), None if it is not in the table."""
    matches = [part for part in DEVICE_PEAKS if part.lower() in device_name.lower()]
    return DEVICE_PEAKS[max(matches, key=len)] if matches else None


def measure_gemm_roof(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest matrix product here: the best single run over some sizes within ``seconds``."""
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for size in (512, 1024) if device.type == "cpu" else (4096, 8192):
            a, b = torch.rand(2, size, size, device=device).to(dtype)
            for product in (torch.mm, linear):
                product(a, b)
                started = time.perf_counter()
                product(a, b)[0, 0].item()  # reading from the result waits for an asynchronous device
                best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _attention_weights(config: ModelConfig) -> int:
    """Weights of one attention block that are matrices."""
    gate = config.num_attention_heads if isinstance(config.attention, SoftGateAttention) else 0
    head_rows = 2 * (config.num_attention_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (head_rows + gate)


def _feed_forward_weights(config: ModelConfig, moe: MoEConfig | None, index: int) -> int:
    """Weights that one token multiplies in the feed-forward block of a layer."""
    if moe is None or not moe.is_moe_layer(index):
        return _mlp_weights(config, config.ffn_size)
    chosen = moe.moe_router_topk * _expert_weights(config, moe)
    return _router_weights(config, moe) + chosen + _shared_weights(config, moe)


def _num_sparse_layers(config: ModelConfig, moe: MoEConfig | None) -> int:
    return sum(map(moe.is_moe_layer, range(config.num_layers))) if moe else 0


def _router_weights(config: ModelConfig, moe: MoEConfig) -> int:
    return (2 if moe.router.fine == "refine" else 1) * moe.num_experts * config.hidden_size


def _expert_weights(config: ModelConfig, moe: MoEConfig) -> int:
    """Weights of one routed expert."""
    return _mlp_weights(config, moe.moe_ffn_hidden_size or config.ffn_size)


def _shared_weights(config: ModelConfig, moe: MoEConfig) -> int:
    return _mlp_weights(config, moe.moe_shared_expert_intermediate_size or 0)


def _mlp_weights(config: ModelConfig, ffn_size: int) -> int:
    return 3 * config.hidden_size * ffn_size


def _windows(config: ModelConfig, index: int) -> list[int | None]:
    """Window of each core attention that one layer runs, None for the whole document."""
    attention = config.attention
    if isinstance(attention, HybridAttention):
        return [attention.window if attention.pattern[index % len(attention.pattern)] == "L" else None]
    if isinstance(attention, SoftGateAttention) and attention.implementation == "lse":
        return [None, attention.window]
    return [None]


def _core_flops(config: ModelConfig, seq_length: int, window: int | None, convention: Convention) -> float:
    """Training FLOPs per token of one core attention: products of 2 K FLOPs per query-key pair and head."""
    first_S = first_keys([0] * seq_length, window)
    if convention == "causal":  # two products forward, four backward
        pairs, products = sum(query + 1 - first for query, first in enumerate(first_S)), 6
    else:  # the backward pass makes the scores again
        pairs, products = sum((end - begin) * (end - first) for begin, end, first in key_ranges(first_S)), 7
    return products * 2 * config.head_dim * config.num_attention_heads * pairs / seq_length
