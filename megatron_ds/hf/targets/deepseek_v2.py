"""deepseek_v2: latent attention and shared experts with a softmax router, whose weights are never normalised.

A group of experts counts as its best one. There is no bias, and no place for MTP blocks. transformers 5 ignores
``norm_topk_prob`` here, so it must be false.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import SpecialIds, Target, head_width_reasons, require
from megatron_ds.hf.targets.deepseek import (
    DEEPSEEK_LAYER_NAMES,
    LATENT_DEFAULTS,
    deepseek_config,
    latent_reasons,
    layer_reasons,
    parse_deepseek,
)
from megatron_ds.hf.targets.experts import bias_reasons, one_of, parse_groups

DEFAULTS = LATENT_DEFAULTS | {
    "n_routed_experts": 64,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
"""What the family takes for keys that are not there; there is none for num_experts_per_tok and the groups."""


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why deepseek_v2 cannot express a model."""
    family, router = "deepseek_v2", moe.router
    found = latent_reasons(family, model) + layer_reasons(family, model, moe) + bias_reasons(family, moe)
    if router.kind != "softmax":
        found.append(f"{family} scores experts by softmax: moe.router.kind is {router.kind}")
    if router.norm_topk_prob:
        found.append(f"{family} never normalises the experts' weights: moe.router.norm_topk_prob is true")
    return found + head_width_reasons(family, model)


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of DeepseekV2ForCausalLM; n_group is 1, not null, without groups, since vLLM needs a number."""
    return {
        **deepseek_config("DeepseekV2ForCausalLM", "deepseek_v2", model, moe, ids, dtype),
        "mlp_bias": False,
        "scoring_func": "softmax",
        "topk_method": "greedy" if moe.router.num_groups is None else "group_limited_greedy",
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of a deepseek_v2; a greedy choice does not look at the groups."""
    config = DEFAULTS | config
    require(config, {"scoring_func": "softmax", "norm_topk_prob": False})
    method = one_of(config, "topk_method", ("greedy", "group_limited_greedy"))
    groups = {} if method == "greedy" else parse_groups(config)
    return parse_deepseek(config, {"kind": "softmax", "fine": "none", "norm_topk_prob": False, **groups})


DEEPSEEK_V2 = Target(
    model_type="deepseek_v2",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers and vLLM; llama.cpp, which scores groups in its own way, when there are none.",
    layer_names=DEEPSEEK_LAYER_NAMES,
    kept_fp32=("mlp.router.weight",),
    untied=True,
    always_shared=True,
)
