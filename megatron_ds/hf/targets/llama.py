"""llama: full attention in every layer, no query/key norm. The family that every engine runs."""

from typing import Any

from megatron_ds.config.schema import ModelConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    gate_reasons,
    head_width_reasons,
    llama_config,
    older_spellings,
    query_key_norm_reasons,
    sliding_window,
)


def reasons(model: ModelConfig) -> list[str]:
    """Why llama cannot express ``model``."""
    found = gate_reasons("llama", model) + query_key_norm_reasons("llama", model, has_norm=False)
    if sliding_window(model) is not None:
        found.append("llama has no per-layer windows: model.attention.kind is hybrid")
    return found + head_width_reasons("llama", model)


def config(model: ModelConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **llama_config(model, ids, dtype),
        **older_spellings(model, dtype),
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


LLAMA = Target(model_type="llama", reasons=reasons, config=config, engines="transformers, vLLM and llama.cpp.")
