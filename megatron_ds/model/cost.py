"""What a model costs: parameters, FLOPs per token under three conventions, and what share of a device's peak that is.

Closed formulas (docs/model.md), no model is built. *causal* counts each visible query-key pair once, forward and twice
backward: the FLOPs that the model needs, and the ones of MFU. *full* counts every pair of a sample, visible or not, as
some publications do. *executed* counts the products that this implementation runs on a CPU, masked pairs of a tile and
the recomputed scores included: what ``torch.utils.flop_counter`` measures. None counts activation recompute. Of a
mixture of experts a token multiplies the router and its own experts, none of which drops it.

The blocks of multi-token prediction are trained and count; ``without_mtp`` is the model that is published.
"""

import time
from collections import Counter
from typing import Literal

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from megatron_ds.config.model_schema import HybridAttention, LatentAttention, ModelConfig, SoftGateAttention
from megatron_ds.config.moe_schema import MoEConfig, has_experts
from megatron_ds.model.attention_mask import first_keys, key_ranges
from megatron_ds.parallel.linear import linear

Convention = Literal["causal", "full", "executed"]

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


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The main model alone."""
    return config.model_copy(update={"mtp_num_layers": 0})


def parameter_counts(config: ModelConfig, moe: MoEConfig | None = None) -> dict[str, int]:
    """Parameters by part of the model; ``output`` is 0 when tied to the embedding, the parts of experts without any.

    ``mlp`` are the dense feed-forward blocks, ``experts`` the routed ones; ``mtp`` are the blocks of multi-token
    prediction with all that is in them. Balancing biases are no parameters.
    """
    counts = dict.fromkeys(("embedding", "attention", "mlp", "router", "experts", "shared", "norm", "mtp", "output"), 0)
    entries = layer_parameters(config, moe)
    if config.mtp_num_layers:
        counts["mtp"] = entries.pop(-2).total()
    for entry in entries:
        for part, size in entry.items():
            counts[part.partition(".")[0]] += size
    return counts


def layer_parameters(config: ModelConfig, moe: MoEConfig | None = None) -> list[Counter[str]]:
    """Parameters of each entry of ``decoder.layer_list`` by part; a late use of the embedding has none.

    The parts of an attention are those with all heads, with the key and value heads (``attention.groups``), and those
    that no head has for itself (``attention.whole``).
    """
    width, depths = config.hidden_size, config.mtp_num_layers
    vocabulary = config.padded_vocab_size * width
    layers = [_decoder_layer(config, moe, index) for index in range(config.num_layers + depths)]
    mtp: Counter[str] = Counter(projection=2 * depths * width**2, norm=3 * depths * width)
    for layer in layers[config.num_layers :]:
        mtp.update(layer)
    return [
        Counter(embedding=vocabulary),
        *layers[: config.num_layers],
        Counter(norm=width),
        *([Counter(), mtp] if depths else []),
        Counter(output=vocabulary if config.untie_embeddings_and_output_weights else 0),
    ]


def num_parameters(config: ModelConfig, moe: MoEConfig | None = None) -> int:
    """Parameters of the whole model, padding of the vocabulary included."""
    return sum(parameter_counts(config, moe).values())


def active_parameters(config: ModelConfig, moe: MoEConfig | None = None) -> int:
    """Parameters that take part in one token: all but the routed experts that it does not go to.

    The input embedding counts; some publications leave it out, ``parameter_counts`` has its size.
    """
    idle = 0
    if moe:
        experts = sum(entry["experts"] for entry in layer_parameters(config, moe))
        idle = experts // moe.num_experts * (moe.num_experts - moe.moe_router_topk)
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
    """``flops_per_token`` of each entry of ``decoder.layer_list``; MTP blocks cost the output layer, too."""
    seq_length, width, depths = seq_length or config.seq_length, config.hidden_size, config.mtp_num_layers
    layers = [
        6 * _multiplied_weights(config, moe, index)
        + sum(_core_flops(config, seq_length, window, convention) for window in _windows(config, index))
        for index in range(config.num_layers + depths)
    ]
    mtp = [0.0, sum(layers[config.num_layers :]) + 6.0 * depths * 2 * width**2] if depths else []
    output = 6.0 * (1 + depths) * config.padded_vocab_size * width
    return [0.0, *layers[: config.num_layers], 0.0, *mtp, output]


def mfu(
    tokens_per_second_per_device: float,
    config: ModelConfig,
    peak: float,
    moe: MoEConfig | None = None,
    *,
    convention: Convention = "causal",
) -> float:
    """Model FLOPs utilisation: the share of ``peak`` FLOP/s that the FLOPs of this throughput are."""
    return tokens_per_second_per_device * flops_per_token(config, moe, convention=convention) / peak


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


def _decoder_layer(config: ModelConfig, moe: MoEConfig | None, index: int) -> Counter[str]:
    """Parameters of one layer by part."""
    parts = Counter({f"attention.{part}": size for part, size in _attention_matrices(config).items()})
    if isinstance(config.attention, LatentAttention):
        parts["attention.whole"] += config.attention.kv_lora_rank + (config.attention.q_lora_rank or 0)
    if isinstance(config.attention, SoftGateAttention):
        parts["attention.heads"] += config.num_attention_heads
    if config.add_qkv_bias:
        parts["attention.heads"] += config.num_attention_heads * config.head_dim
        parts["attention.groups"] += 2 * config.num_kv_heads * config.head_dim
    if config.qk_layernorm:
        parts["attention.whole"] += 2 * config.head_dim
    parts["norm"] = 2 * config.hidden_size
    if not has_experts(config, moe, index):
        return parts + Counter(mlp=_mlp_weights(config, config.ffn_size))
    return parts + Counter(
        router=_router_weights(config, moe),
        experts=moe.num_experts * _expert_weights(config, moe),
        shared=_shared_weights(config, moe),
    )


def _attention_matrices(config: ModelConfig) -> Counter[str]:
    """Weights of one attention block that are matrices, by part as in ``layer_parameters``."""
    width, heads, attention = config.hidden_size, config.num_attention_heads, config.attention
    if isinstance(attention, LatentAttention):
        plain, rotary, value = attention.qk_head_dim, attention.qk_pos_emb_head_dim, attention.v_head_dim
        from_latent = attention.kv_lora_rank * heads * (plain + value) + heads * value * width
        queries, down = heads * (plain + rotary), width * (attention.kv_lora_rank + rotary)
        if attention.q_lora_rank is None:
            return Counter(heads=from_latent + width * queries, whole=down)
        return Counter(heads=from_latent + attention.q_lora_rank * queries, whole=down + width * attention.q_lora_rank)
    gate = heads if isinstance(attention, SoftGateAttention) else 0
    return Counter(
        heads=width * (2 * heads * config.head_dim + gate), groups=width * 2 * config.num_kv_heads * config.head_dim
    )


def _multiplied_weights(config: ModelConfig, moe: MoEConfig | None, index: int) -> int:
    """Weights that one token multiplies in a layer."""
    attention = _attention_matrices(config).total()
    if not has_experts(config, moe, index):
        return attention + _mlp_weights(config, config.ffn_size)
    chosen = moe.moe_router_topk * _expert_weights(config, moe)
    return attention + _router_weights(config, moe) + chosen + _shared_weights(config, moe)


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
    """Training FLOPs per token of one core attention: products of 2 K FLOPs per query-key pair and head.

    Scores and their gradients for queries and keys have the width of a key, the others that of a value.
    """
    first_S = first_keys([0] * seq_length, window)
    if convention == "causal":
        pairs = sum(query + 1 - first for query, first in enumerate(first_S))
    elif convention == "full":
        pairs = seq_length**2
    else:
        pairs = sum((end - begin) * (end - first) for begin, end, first in key_ranges(first_S))
    key_width = value_width = config.head_dim
    if isinstance(config.attention, LatentAttention):
        key_width = config.attention.qk_head_dim + config.attention.qk_pos_emb_head_dim
        value_width = config.attention.v_head_dim
    # Two products forward, four backward, where the executed ones make the scores again.
    width = 3 * (key_width + value_width) + (key_width if convention == "executed" else 0)
    return 2 * width * config.num_attention_heads * pairs / seq_length
