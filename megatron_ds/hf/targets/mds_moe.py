"""mds_moe: our own family for every router that no stock family has; its code travels with the export.

Whatever a router can be configured to do, this family holds: sigmoid scores, groups, the learned refine stage, weights
that are scaled or not normalised; with either rotary convention, query/key norm or not, per-layer windows or not. Only
the soft gate is missing. Models that a stock family can hold need no trust_remote_code there, so ``auto`` tries this
last.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import (
    SpecialIds,
    Target,
    attention_reasons,
    given,
    layer_types,
    llama_config,
    parse_llama,
    parse_windows,
    sliding_window,
    whole_number,
)
from megatron_ds.hf.targets.experts import (
    EXPERT_LAYER_NAMES,
    SHARED_EXPERT_NAMES,
    dense_layers,
    expert_config,
    expert_width,
    one_of,
    parse_groups,
    parse_layers,
)

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_qk_norm": False,
    "rope_interleaved": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 2048,
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
"""What the family takes for keys that are not there."""


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why mds_moe cannot express a model."""
    return attention_reasons("mds_moe", model)


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of MdsMoeForCausalLM; names are those of stock families where they have the setting."""
    router = moe.router
    refines = router.fine == "refine"
    return {
        "architectures": ["MdsMoeForCausalLM"],
        "model_type": "mds_moe",
        "auto_map": {
            "AutoConfig": "configuration_mds_moe.MdsMoeConfig",
            "AutoModel": "modeling_mds_moe.MdsMoeModel",
            "AutoModelForCausalLM": "modeling_mds_moe.MdsMoeForCausalLM",
        },
        **llama_config(model, ids, dtype),
        **expert_config(moe),
        "use_qk_norm": model.qk_layernorm,
        "rope_interleaved": model.rotary_interleaved,
        "layer_types": layer_types(model),
        "sliding_window": sliding_window(model),
        "moe_intermediate_size": expert_width(model, moe),
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "mlp_only_layers": dense_layers(model, moe),
        "scoring_func": router.kind,
        "n_group": router.num_groups,
        "topk_group": router.group_topk,
        "refine_candidates": (router.refine_candidates or 2 * moe.moe_router_topk) if refines else None,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.scaling_factor,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of an mds_moe."""
    config = DEFAULTS | config
    model = parse_llama(config)
    layers, dense = model["num_layers"], given(config, "mlp_only_layers", [])
    candidates = config.get("refine_candidates")
    router = {
        "kind": one_of(config, "scoring_func", ("softmax", "sigmoid")),
        "fine": "bias" if candidates is None else "refine",
        "refine_candidates": candidates,
        "norm_topk_prob": config["norm_topk_prob"],
        "scaling_factor": config["routed_scaling_factor"],
        **({} if config.get("n_group") is None else parse_groups(config)),
    }
    own = {
        "attention": parse_windows(
            given(config, "layer_types", ["full_attention"] * layers), config.get("sliding_window")
        ),
        "qk_layernorm": config["use_qk_norm"],
        "rotary_interleaved": config["rope_interleaved"],
    }
    moe = {
        "num_experts": whole_number(config, "num_local_experts", "num_experts"),
        "moe_router_topk": whole_number(config, "num_experts_per_tok"),
        "moe_ffn_hidden_size": whole_number(config, "moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": config.get("shared_expert_intermediate_size"),
        **parse_layers([layer not in dense for layer in range(layers)], "mlp_only_layers"),
        "router": router,
    }
    return {"model": model | own, "moe": moe}


MDS_MOE = Target(
    model_type="mds_moe",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers 5 with trust_remote_code=True.",
    layer_names=EXPERT_LAYER_NAMES
    | SHARED_EXPERT_NAMES
    | {"mlp.router.bias": "mlp.gate.e_score_correction_bias", "mlp.router.refine": "mlp.gate.refine"},
    kept_fp32=("mlp.router.weight", "mlp.router.bias", "mlp.router.refine"),
    code_files=("configuration_mds_moe.py", "modeling_mds_moe.py", "modeling_mds_common.py"),
)
