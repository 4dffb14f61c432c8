"""qwen3: query/key norm, every layer full or sliding. The first choice for v1's defaults."""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    parse_llama,
    query_key_norm_reasons,
    stock_config,
    stock_dense_reasons,
)
from megatron_ds.hf.targets.qwen import DEFAULTS, ENGINES, parse_window_config, window_config


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why qwen3 cannot express a model."""
    return stock_dense_reasons("qwen3", model) + query_key_norm_reasons("qwen3", model, has_norm=True)


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Qwen3ForCausalLM."""
    return {
        **stock_config("Qwen3ForCausalLM", "qwen3", model, ids, dtype),
        "attention_bias": False,
        **window_config(model),
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a qwen3."""
    config = {"head_dim": 128} | DEFAULTS | config
    model = parse_llama(config)
    attention = parse_window_config(config, model["num_layers"])
    return {"model": model | {"attention": attention, "qk_layernorm": True, "rotary_interleaved": False}}


QWEN3 = Target(model_type="qwen3", limits=limits, config=config, parse=parse, engines=ENGINES)
