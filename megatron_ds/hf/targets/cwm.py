"""cwm: Llama with a full or sliding choice per layer; no query/key norm.

The family's own defaults are traps (llama3 rotary scaling, end-of-sequence ids of another vocabulary), so every key
is written.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    head_width_reasons,
    layer_types,
    query_key_norm_reasons,
    sliding_window,
    stock_config,
    stock_dense_reasons,
)


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why cwm cannot express a model."""
    found = stock_dense_reasons("cwm", model) + query_key_norm_reasons("cwm", model, has_norm=False)
    return found + head_width_reasons("cwm", model)


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of CwmForCausalLM. The family wants a window even when no layer slides; then it is never read."""
    return {
        **stock_config("CwmForCausalLM", "cwm", model, ids, dtype),
        "mlp_bias": False,
        "pretraining_tp": 1,
        "layer_types": layer_types(model),
        "sliding_window": sliding_window(model) or model.max_positions,
    }


CWM = Target(
    model_type="cwm",
    limits=limits,
    config=config,
    engines="transformers 5 and vLLM, both with the per-layer windows; llama.cpp does not know the family.",
)
