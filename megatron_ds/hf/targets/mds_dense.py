"""mds_dense: our own family for the soft gate, which no stock family has; its code travels with the export.

It holds soft-gate models only. Everything else has a stock target, which needs no trust_remote_code.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import SpecialIds, Target, given, llama_config, parse_llama, whole_number


def limits(model: ModelConfig, moe: None) -> list[str]:
    """Why mds_dense cannot express a model."""
    kind = model.attention.kind
    return [] if kind == "soft_gate" else [f"mds_dense is for the soft gate only: model.attention.kind is {kind}"]


def config(model: ModelConfig, moe: None, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of MdsDenseForCausalLM, in transformers 5's spelling only, since nothing else reads it.

    AutoModel stands in auto_map for engines that build on transformers, so that they can say why they refuse.
    """
    return {
        "architectures": ["MdsDenseForCausalLM"],
        "model_type": "mds_dense",
        "auto_map": {
            "AutoConfig": "configuration_mds_dense.MdsDenseConfig",
            "AutoModel": "modeling_mds_dense.MdsDenseModel",
            "AutoModelForCausalLM": "modeling_mds_dense.MdsDenseForCausalLM",
        },
        **llama_config(model, ids, dtype),
        "use_qk_norm": model.qk_layernorm,
        "rope_interleaved": model.rotary_interleaved,
        "local_window": model.attention.window + 1,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The model section for the config.json of an mds_dense."""
    own = {
        "attention": {"kind": "soft_gate", "window": whole_number(config, "local_window") - 1},
        "qk_layernorm": given(config, "use_qk_norm", True),
        "rotary_interleaved": given(config, "rope_interleaved", False),
    }
    return {"model": parse_llama({"tie_word_embeddings": True} | config) | own}


MDS_DENSE = Target(
    model_type="mds_dense",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers 5 with trust_remote_code=True (eager and sdpa attention). Engines with attention kernels of "
    "their own would drop the gate and are refused.",
    code_files=("configuration_mds_dense.py", "modeling_mds_dense.py", "modeling_mds_common.py"),
)
