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
    mixed_window_reasons,
    parse_llama,
    parse_window,
    query_key_norm_reasons,
    rotary_reasons,
    sliding_window,
    stock_config,
    whole_number,
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

DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""What the family takes for keys that are not there."""


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why mixtral cannot express a model."""
    family = "mixtral"
    found = plain_router_reasons(family, model, moe) + normalised_weight_reasons(family, moe)
    found += bias_reasons(family, moe) + shared_expert_reasons(family, moe)
    found += query_key_norm_reasons(family, model, has_norm=False)
    found += rotary_reasons(family, model, interleaved=False) + mixed_window_reasons(family, model)
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
        "sliding_window": sliding_window(model),
        "router_jitter_noise": 0.0,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of a mixtral.

    ``router_jitter_noise`` is noise of training, not of the model: like every choice of training, it is the run's.
    """
    config = DEFAULTS | config
    model = parse_llama(config)
    attention = parse_window(model["num_layers"], config.get("sliding_window"))
    return {
        "model": model | {"attention": attention, "qk_layernorm": False, "rotary_interleaved": False},
        "moe": {
            "num_experts": whole_number(config, "num_experts", "num_local_experts"),
            "moe_router_topk": whole_number(config, "num_experts_per_tok"),
            "moe_ffn_hidden_size": model["ffn_hidden_size"],
            "moe_layer_freq": 1,
            "router": {"kind": "softmax", "fine": "none", "norm_topk_prob": True},
        },
    }


MIXTRAL = Target(
    model_type="mixtral",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers and vLLM; llama.cpp, too, when there is no window.",
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
