"""llama: full attention in every layer, no query/key norm. The family that every engine runs."""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    head_width_reasons,
    parse_llama,
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


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a llama."""
    own = {"attention": {"kind": "full"}, "qk_layernorm": False, "rotary_interleaved": False}
    return {"model": parse_llama(config) | own}


LLAMA = Target(
    model_type="llama", limits=limits, config=config, engines="transformers, vLLM and llama.cpp.", parse=parse
)
