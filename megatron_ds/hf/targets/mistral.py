"""mistral: Llama with one window for all layers, or none, and heads of any width; no query/key norm.

A config.json without the key sliding_window has one: transformers takes the 4096 of the first Mistral. So it is always
written, null for full attention.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    mixed_window_reasons,
    parse_llama,
    parse_window,
    query_key_norm_reasons,
    require,
    sliding_window,
    stock_config,
    stock_dense_reasons,
)

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
"""What the family takes for keys that are not there."""


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why mistral cannot express a model."""
    found = stock_dense_reasons("mistral", model) + query_key_norm_reasons("mistral", model, has_norm=False)
    return found + mixed_window_reasons("mistral", model)


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of MistralForCausalLM."""
    return {
        **stock_config("MistralForCausalLM", "mistral", model, ids, dtype),
        "sliding_window": sliding_window(model),
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a mistral.

    Refuses layer_types that say otherwise than sliding_window: transformers ignores them, vLLM does not.
    """
    config = DEFAULTS | config
    model, window = parse_llama(config), config["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    require(config, {"layer_types": [kind] * model["num_layers"]})
    own = {"attention": parse_window(model["num_layers"], window), "qk_layernorm": False, "rotary_interleaved": False}
    return {"model": model | own}


MISTRAL = Target(
    model_type="mistral",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers and vLLM, both with the window; llama.cpp ignores it, so only with full attention.",
)
