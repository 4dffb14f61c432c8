"""cwm: Llama with a full or sliding choice per layer; no query/key norm.

The family's own defaults are traps (llama3 rotary scaling, end-of-sequence ids of another vocabulary), so every key
is written.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    given,
    head_width_reasons,
    layer_types,
    parse_llama,
    parse_windows,
    query_key_norm_reasons,
    sliding_window,
    stock_config,
    stock_dense_reasons,
)

DEFAULTS = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
"""What the family takes for keys that are not there."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The same when there are no rotary settings at all."""


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


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of a cwm, whose defaults are not Llama's."""
    rope = {} if {"rope_parameters", "rope_scaling", "rope_theta"} & set(config) else {"rope_parameters": LLAMA3_ROPE}
    model = parse_llama(DEFAULTS | rope | config)
    kinds = ["sliding_attention" if layer % 4 else "full_attention" for layer in range(model["num_layers"])]
    attention = parse_windows(given(config, "layer_types", kinds), given(config, "sliding_window", 8192))
    return {"model": model | {"attention": attention, "qk_layernorm": False, "rotary_interleaved": False}}


CWM = Target(
    model_type="cwm",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers 5 and vLLM, both with the per-layer windows; llama.cpp does not know the family.",
)
