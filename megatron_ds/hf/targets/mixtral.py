"""mixtral: experts in every layer, softmax router that always normalises; no query/key norm, bias or shared expert.

Like qwen3_moe it multiplies router and input in the model's dtype. Its experts have Mixtral's own names: w1 is the
gate, w3 the up projection, w2 the way down.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import (
    LAYER_NAMES,
    SpecialIds,
    Target,
    query_key_norm_reasons,
    rotary_reasons,
    stock_config,
    window_reasons,
)
from megatron_ds.hf.targets.experts import (
    bias_reasons,
    dense_layers,
    expert_config,
    expert_width,
    normalised_weight_reasons,
    plain_router_reasons,
    shared_expert_reasons,
)


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why mixtral cannot express a model."""
    family = "mixtral"
    found = plain_router_reasons(family, model, moe) + normalised_weight_reasons(family, moe)
    found += bias_reasons(family, moe) + shared_expert_reasons(family, moe)
    found += query_key_norm_reasons(family, model, has_norm=False)
    found += rotary_reasons(family, model, interleaved=False) + window_reasons(family, model)
    dense = dense_layers(model, moe)
    if dense:
        found.append(f"{family} has experts in every layer: moe.moe_layer_freq leaves layers {dense} dense")
    return found


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of MixtralForCausalLM; intermediate_size is the width of an expert."""
    return {
        **stock_config("MixtralForCausalLM", "mixtral", model, ids, dtype),
        **expert_config(moe),
        "intermediate_size": expert_width(model, moe),
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Target(
    model_type="mixtral",
    limits=limits,
    config=config,
    engines="transformers, vLLM and llama.cpp.",
    layer_names=LAYER_NAMES
    | {
        "mlp.router.weight": "block_sparse_moe.gate.weight",
        "mlp.experts.gate_up": (
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        "mlp.experts.down": ("block_sparse_moe.experts.{expert}.w2.weight",),
    },
)
