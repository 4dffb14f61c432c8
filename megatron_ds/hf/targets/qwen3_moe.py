"""qwen3_moe: query/key norm, softmax router without bias or shared expert, dense layers wherever one likes.

The family multiplies router and input in the model's dtype, not in fp32: in 16 bits a few tokens near a tie go to other
experts than in training. Layers that are not sparse are listed one by one.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    given,
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
    EXPERT_LAYER_NAMES,
    bias_reasons,
    dense_layers,
    expert_config,
    expert_width,
    parse_layers,
    plain_router_reasons,
    shared_expert_reasons,
)

DEFAULTS = {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
}
"""What the family takes for keys that are not there."""


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why qwen3_moe cannot express a model."""
    family = "qwen3_moe"
    found = plain_router_reasons(family, model, moe) + bias_reasons(family, moe) + shared_expert_reasons(family, moe)
    found += query_key_norm_reasons(family, model, has_norm=True)
    return found + rotary_reasons(family, model, interleaved=False) + mixed_window_reasons(family, model)


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Qwen3MoeForCausalLM."""
    window = sliding_window(model)
    return {
        **stock_config("Qwen3MoeForCausalLM", "qwen3_moe", model, ids, dtype),
        **expert_config(moe),
        "attention_bias": False,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers,
        "moe_intermediate_size": expert_width(model, moe),
        "norm_topk_prob": moe.router.norm_topk_prob,
        "mlp_only_layers": dense_layers(model, moe),
        "decoder_sparse_step": 1,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of a qwen3_moe; a layer is sparse by its number and if it is not listed."""
    config = DEFAULTS | config
    model = parse_llama(config)
    dense, step = given(config, "mlp_only_layers", []), whole_number(config, "decoder_sparse_step")
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(model["num_layers"])]
    window = config["sliding_window"] if given(config, "use_sliding_window", False) else None
    attention = parse_window(model["num_layers"], window)
    normalises = given(config, "norm_topk_prob", False)
    return {
        "model": model | {"attention": attention, "qk_layernorm": True, "rotary_interleaved": False},
        "moe": {
            "num_experts": whole_number(config, "num_local_experts", "num_experts"),
            "moe_router_topk": whole_number(config, "num_experts_per_tok"),
            "moe_ffn_hidden_size": whole_number(config, "moe_intermediate_size"),
            **parse_layers(sparse, "mlp_only_layers"),
            "router": {"kind": "softmax", "fine": "none", "norm_topk_prob": normalises},
        },
    }


QWEN3_MOE = Target(
    model_type="qwen3_moe",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers and vLLM; llama.cpp, too, when there is no window.",
    layer_names=EXPERT_LAYER_NAMES,
)
