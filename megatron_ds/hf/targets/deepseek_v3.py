"""deepseek_v3: latent attention, a sigmoid router with bias and groups, shared experts, MTP blocks. v3's defaults.

The family always chooses among groups, so a model without them has one, and always adds a bias and a shared expert, so
a model without them gets zeros. MTP blocks are stored as layers beyond the last one, each with copies of embedding and
output. transformers knows them at the depth of DeepSeek-V3 only; vLLM at any. Without ``topk_method`` and
``scoring_func`` vLLM would silently route by softmax and without the bias.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.targets.common import (
    MtpLayout,
    SpecialIds,
    Target,
    given,
    require,
    whole_number,
)
from megatron_ds.hf.targets.deepseek import (
    DEEPSEEK_LAYER_NAMES,
    LATENT_DEFAULTS,
    deepseek_config,
    latent_reasons,
    layer_reasons,
    parse_deepseek,
)
from megatron_ds.hf.targets.experts import parse_groups

DEFAULTS = LATENT_DEFAULTS | {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
"""What the family takes for keys that are not there."""


def limits(model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why deepseek_v3 cannot express a model."""
    family, router = "deepseek_v3", moe.router
    found = latent_reasons(family, model) + layer_reasons(family, model, moe)
    if router.kind != "sigmoid":
        found.append(f"{family} scores experts by sigmoid: moe.router.kind is {router.kind}")
    if moe.num_experts == 1:
        found.append(f"{family} scores a group by its two best experts: moe.num_experts is 1")
    return found


def config(model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of DeepseekV3ForCausalLM."""
    return {
        **deepseek_config("DeepseekV3ForCausalLM", "deepseek_v3", model, moe, ids, dtype),
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_router_dtype": "float32",
        "num_nextn_predict_layers": model.mtp_num_layers,
    }


def parse(config: dict[str, Any]) -> dict[str, Any]:
    """The sections for the config.json of a deepseek_v3.

    ``mtp_num_layers`` is what it declares, by default 1; how many blocks there are, only the files know.
    """
    config = DEFAULTS | config
    require(config, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    normalises = given(config, "norm_topk_prob", True)
    router = {"kind": "sigmoid", "fine": "bias", "norm_topk_prob": normalises, **parse_groups(config)}
    sections = parse_deepseek(config, router)
    blocks = whole_number(config, "num_mtp_layers", "num_nextn_predict_layers", least=0)
    own = {"rotary_interleaved": given(config, "rope_interleave", True), "mtp_num_layers": blocks}
    return sections | {"model": sections["model"] | own}


DEEPSEEK_V3 = Target(
    model_type="deepseek_v3",
    limits=limits,
    config=config,
    parse=parse,
    engines="transformers, vLLM and llama.cpp.",
    layer_names=DEEPSEEK_LAYER_NAMES | {"mlp.router.bias": "mlp.gate.e_score_correction_bias"},
    kept_fp32=("mlp.router.weight", "mlp.router.bias"),
    untied=True,
    always_shared=True,
    mtp=MtpLayout(
        names={
            "embedding_norm.weight": "enorm.weight",
            "hidden_norm.weight": "hnorm.weight",
            "projection.weight": "eh_proj.weight",
            "norm.weight": "shared_head.norm.weight",
        },
        embedding="embed_tokens.weight",
        output="shared_head.head.weight",
        architecture="DeepSeekMTPModel",
        known_num_layers=61,
    ),
)
