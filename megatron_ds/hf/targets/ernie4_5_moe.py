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
    parse_llama,
    query_key_norm_reasons,
    require,
    rotary_reasons,
    stock_config,
    whole_number,
    window_reasons,
)
from megatron_ds.hf.targets.experts import (
    EXPERT_LAYER_NAMES,
    SHARED_EXPERT_NAMES,
    expert_config,
    expert_width,
    normalised_weight_reasons,
    parse_layers,
    parse_shared,
    plain_router_reasons,
)

DEFAULTS = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}
"""What the family takes for keys that are not there."""


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


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of an ernie4_5_moe; its bias only selects, as ours does."""
    config = DEFAULTS | config
    require(config, {"use_bias": False, "moe_norm_min": 1e-12})
    model, width = parse_llama(config), whole_number(config, "moe_intermediate_size")
    start = whole_number(config, "moe_layer_start_index", least=0)
    end = whole_number(config, "moe_layer_end_index", least=-1)
    last, interval = end if end >= 0 else model["num_layers"] - 1, whole_number(config, "moe_layer_interval")
    sparse = [start <= layer <= last and (layer + 1) % interval == 0 for layer in range(model["num_layers"])]
    return {
        "model": model | {"attention": {"kind": "full"}, "qk_layernorm": False, "rotary_interleaved": True},
        "moe": {
            "num_experts": whole_number(config, "num_experts", "moe_num_experts"),
            "moe_router_topk": whole_number(config, "num_experts_per_tok", "moe_k"),
            "moe_ffn_hidden_size": width,
            **parse_shared(config, "moe_num_shared_experts", width),
            **parse_layers(sparse, "moe_layer_interval"),
            "router": {"kind": "softmax", "fine": "bias", "norm_topk_prob": True},
        },
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
    parse=parse,
    engines="transformers 5 and vLLM. llama.cpp asks for a SentencePiece vocabulary.",
    layer_names=EXPERT_LAYER_NAMES
    | SHARED_EXPERT_NAMES
    | {"mlp.router.bias": "mlp.moe_statics.e_score_correction_bias"},
    kept_fp32=("mlp.router.weight", "mlp.router.bias"),
    as_row=("mlp.router.bias",),
)
