"""qwen2: a bias on queries, keys and values, no query/key norm, every layer full or sliding.

The output projection has no bias, which tells the family from a llama with attention_bias. Engines take the width of a
head to be hidden_size / num_attention_heads and do not read head_dim.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    LAYER_NAMES,
    SpecialIds,
    Target,
    parse_llama,
    query_key_norm_reasons,
    stock_config,
    stock_dense_reasons,
)
from megatron_ds.hf.targets.qwen import DEFAULTS, ENGINES, parse_window_config, window_config


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why qwen2 cannot express a model."""
    found = stock_dense_reasons("qwen2", model) + query_key_norm_reasons("qwen2", model, has_norm=False)
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        sizes = f"{model.num_attention_heads} heads of {model.head_dim} for model.hidden_size {model.hidden_size}"
        found.append(f"qwen2 divides the width among the heads: there are {sizes}")
    return found


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Qwen2ForCausalLM."""
    return {**stock_config("Qwen2ForCausalLM", "qwen2", model, ids, dtype), **window_config(model)}


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a qwen2."""
    config = DEFAULTS | config
    model = parse_llama(config)
    own = {
        "attention": parse_window_config(config, model["num_layers"]),
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "rotary_interleaved": False,
    }
    return {"model": model | own}


QWEN2 = Target(
    model_type="qwen2",
    limits=limits,
    config=config,
    parse=parse,
    engines=ENGINES,
    layer_names=LAYER_NAMES
    | {
        "attention.query.bias": "self_attn.q_proj.bias",
        "attention.key.bias": "self_attn.k_proj.bias",
        "attention.value.bias": "self_attn.v_proj.bias",
    },
)
