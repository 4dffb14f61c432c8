"""ernie4_5_moe: softmax router with a balancing bias, shared experts, interleaved rotary pairs. v2's defaults.

The family routes in fp32 and loads the router's weight and bias in fp32 whatever the rest is, so they are written that
way. Shared experts are one wide block, declared as a number of experts of the routed width.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    query_key_norm_reasons,
    rotary_reasons,
    stock_config,
    window_reasons,
)
from megatron_ds.hf.targets.experts import (
    EXPERT_LAYER_NAMES,
    SHARED_EXPERT_NAMES,
    expert_config,
    expert_width,
    normalised_weight_reasons,
    plain_router_reasons,
)


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why ernie4_5_moe cannot express a model."""
    family = "ernie4_5_moe"
    found = plain_router_reasons(family, model, moe) + normalised_weight_reasons(family, moe)
    found += query_key_norm_reasons(family, model, has_norm=False)
    found += rotary_reasons(family, model, interleaved=True) + window_reasons(family, model)
    width, shared = expert_width(model, moe), moe.moe_shared_expert_intermediate_size
    if shared and shared % width:
        rule = f"has shared experts as wide as the routed ones ({width}) or a multiple"
        found.append(f"{family} {rule}: moe.moe_shared_expert_intermediate_size is {shared}")
    if sparse_range(model, moe) is None:
        rule = "has experts in every layer of a range, or in every n-th where n divides each layer's number plus one"
        found.append(f"{family} {rule}: moe.moe_layer_freq is {_shown(moe.moe_layer_freq)}")
    return found


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Ernie4_5_MoeForCausalLM."""
    start, end, interval = sparse_range(model, moe)
    width = expert_width(model, moe)
    return {
        **stock_config("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", model, ids, dtype),
        **expert_config(moe),
        "use_bias": False,
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.moe_router_topk,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": (moe.moe_shared_expert_intermediate_size or 0) // width,
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
        "moe_norm_min": 1e-12,
    }


def sparse_range(model: ModelConfig, moe: MoEConfig) -> tuple[int, int, int] | None:
    """(start, end, interval): layer l has experts when start <= l <= end and interval divides l + 1.

    None when the layers with experts cannot be said that way.
    """
    sparse = [layer for layer in range(model.num_layers) if moe.is_moe_layer(layer)]
    interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    said = [layer for layer in range(sparse[0], sparse[-1] + 1) if (layer + 1) % interval == 0] if sparse else None
    return (sparse[0], sparse[-1], interval) if said == sparse else None


def _shown(frequency: int | tuple[int, ...]) -> int | list[int]:
    return frequency if isinstance(frequency, int) else list(frequency)


ERNIE4_5_MOE = Target(
    model_type="ernie4_5_moe",
    limits=limits,
    config=config,
    engines="transformers 5 and vLLM. llama.cpp asks for a SentencePiece vocabulary.",
    layer_names=EXPERT_LAYER_NAMES
    | SHARED_EXPERT_NAMES
    | {"mlp.router.bias": "mlp.moe_statics.e_score_correction_bias"},
    kept_fp32=("mlp.router.weight", "mlp.router.bias"),
    as_row=("mlp.router.bias",),
)
