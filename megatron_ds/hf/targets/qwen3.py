"""qwen3: query/key norm, every layer full or sliding. The first choice for v1's defaults.

Sliding layers need use_sliding_window true beside layer_types: with the family's default, false, transformers forgets
the window and fails at the first forward pass.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    layer_types,
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


QWEN3 = Target(
    model_type="qwen3",
    limits=limits,
    config=config,
    engines="transformers. With full attention in every layer also vLLM and llama.cpp; with sliding layers those two "
    "may ignore the windows, so run vLLM with --model-impl transformers.",
)
