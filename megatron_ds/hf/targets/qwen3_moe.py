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
    query_key_norm_reasons,
    rotary_reasons,
    stock_config,
    window_reasons,
)
from megatron_ds.hf.targets.experts import (
    EXPERT_LAYER_NAMES,
    bias_reasons,
    dense_layers,
    expert_config,
    expert_width,
    plain_router_reasons,
    shared_expert_reasons,
)


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why qwen3_moe cannot express a model."""
    family = "qwen3_moe"
    found = plain_router_reasons(family, model, moe) + bias_reasons(family, moe) + shared_expert_reasons(family, moe)
    found += query_key_norm_reasons(family, model, has_norm=True)
    return found + rotary_reasons(family, model, interleaved=False) + window_reasons(family, model)


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Qwen3MoeForCausalLM."""
    return {
        **stock_config("Qwen3MoeForCausalLM", "qwen3_moe", model, ids, dtype),
        **expert_config(moe),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model.num_layers,
        "moe_intermediate_size": expert_width(model, moe),
        "norm_topk_prob": moe.router.norm_topk_prob,
        "mlp_only_layers": dense_layers(model, moe),
        "decoder_sparse_step": 1,
    }


QWEN3_MOE = Target(
    model_type="qwen3_moe",
    limits=limits,
    config=config,
    engines="transformers, vLLM and llama.cpp.",
    layer_names=EXPERT_LAYER_NAMES,
)
