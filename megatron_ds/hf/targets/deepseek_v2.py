"""deepseek_v2: latent attention and shared experts with a softmax router, whose weights are never normalised.

A group of experts counts as its best one. There is no bias, and no place for MTP blocks. transformers 5 ignores
``norm_topk_prob`` here, so it must be false.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import SpecialIds, Target, head_width_reasons
from megatron_ds.hf.targets.deepseek import DEEPSEEK_LAYER_NAMES, deepseek_config, latent_reasons, layer_reasons
from megatron_ds.hf.targets.experts import bias_reasons


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


DEEPSEEK_V2 = Target(
    model_type="deepseek_v2",
    limits=limits,
    config=config,
    engines="transformers and vLLM; llama.cpp, which scores groups in its own way, when there are none.",
    layer_names=DEEPSEEK_LAYER_NAMES,
    kept_fp32=("mlp.router.weight",),
    untied=True,
    always_shared=True,
)
