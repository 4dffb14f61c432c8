"""llama: full attention in every layer, no query/key norm. The family that every engine runs."""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    head_width_reasons,
    query_key_norm_reasons,
    stock_config,
    stock_dense_reasons,
    window_reasons,
)


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why llama cannot express a model."""
    found = stock_dense_reasons("llama", model) + query_key_norm_reasons("llama", model, has_norm=False)
    return found + window_reasons("llama", model) + head_width_reasons("llama", model)


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of LlamaForCausalLM."""
    return {
        **stock_config("LlamaForCausalLM", "llama", model, ids, dtype),
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


LLAMA = Target(model_type="llama", limits=limits, config=config, engines="transformers, vLLM and llama.cpp.")
