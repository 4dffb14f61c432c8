"""qwen3: query/key norm, every layer full or sliding. The first choice for v1's defaults.

Sliding layers need use_sliding_window true beside layer_types: with the family's default, false, transformers forgets
the window and fails at the first forward pass.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    given,
    layer_types,
    parse_llama,
    parse_windows,
    query_key_norm_reasons,
    sliding_window,
    stock_config,
    stock_dense_reasons,
)


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why qwen3 cannot express a model."""
    return stock_dense_reasons("qwen3", model) + query_key_norm_reasons("qwen3", model, has_norm=True)


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of Qwen3ForCausalLM. vLLM asserts that max_window_layers equals the depth on mixed layers."""
    window = sliding_window(model)
    return {
        **stock_config("Qwen3ForCausalLM", "qwen3", model, ids, dtype),
        "attention_bias": False,
        "layer_types": layer_types(model),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a qwen3.

    Without layer_types, the layers from max_window_layers on slide; none does unless use_sliding_window is true.
    """
    model = parse_llama({"head_dim": 128} | config)
    slides, first = given(config, "use_sliding_window", False), given(config, "max_window_layers", 28)
    kinds = [
        "sliding_attention" if slides and layer >= first else "full_attention" for layer in range(model["num_layers"])
    ]
    window = config.get("sliding_window") if slides else None
    attention = parse_windows(given(config, "layer_types", kinds), window)
    return {"model": model | {"attention": attention, "qk_layernorm": True, "rotary_interleaved": False}}


QWEN3 = Target(
    model_type="qwen3",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers. With full attention in every layer also vLLM and llama.cpp; with sliding layers those two "
    "may ignore the windows, so run vLLM with --model-impl transformers.",
)
