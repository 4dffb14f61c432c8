"""What DeepSeek's two families share: latent attention, a dense prefix, shared experts, a head of its own.

Both store the weights of a latent attention as our decoder has them, so nothing is permuted or cut. What sets them
apart is the router (``deepseek_v2.py``, ``deepseek_v3.py``). transformers takes 1e-6 as the epsilon of the two norms
inside the attention whatever ``rms_norm_eps`` says, and vLLM takes ``rms_norm_eps``: a model with another epsilon would
be two models, so it is refused, both ways.
"""

from typing import Any

from megatron_ds.config.model_schema import LatentAttention, ModelConfig, YarnRope
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets.common import (
    SpecialIds,
    parse_llama,
    require,
    rotary_reasons,
    stock_config,
    whole_number,
)
from megatron_ds.hf.targets.experts import (
    EXPERT_LAYER_NAMES,
    SHARED_EXPERT_NAMES,
    dense_layers,
    expert_width,
    parse_layers,
    parse_shared,
)

LATENT_NORM_EPSILON = 1e-6

LATENT_DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""What both families take for keys of the attention that are not there."""

DEEPSEEK_LAYER_NAMES = (
    EXPERT_LAYER_NAMES
    | SHARED_EXPERT_NAMES
    | {
        "attention.query_down.weight": "self_attn.q_a_proj.weight",
        "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
        "attention.query_up.weight": "self_attn.q_b_proj.weight",
        "attention.key_value_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.key_value_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attention.key_value_up.weight": "self_attn.kv_b_proj.weight",
    }
)
"""Names of a layer; queries that are not compressed are q_proj, as in every family."""


def latent_reasons(family: str, model: ModelConfig) -> list[str]:
    """Why a family of latent attention cannot express the attention; no other could, so each says what to train."""
    if not isinstance(model.attention, LatentAttention):
        return [f"{family} has latent attention: model.attention.kind is {model.attention.kind}"]
    pairs = rotary_reasons(family, model, interleaved=True)
    found = [f"{reason} (train with model.rotary_interleaved true)" for reason in pairs]
    if model.qk_layernorm:
        found.append(f"{family} has no norm on query and key heads: model.qk_layernorm is true (train without)")
    if model.norm_epsilon != LATENT_NORM_EPSILON:
        rule = f"has an epsilon of {LATENT_NORM_EPSILON} in the norms of its latent vectors, so in all"
        found.append(f"{family} {rule}: model.norm_epsilon is {model.norm_epsilon} (train with it)")
    return found + _extension_reasons(family, model)


def _extension_reasons(family: str, model: ModelConfig) -> list[str]:
    """Engines agree about YaRN with both mscales, or with neither; about nothing else."""
    scaling = model.rope_scaling
    if not isinstance(scaling, YarnRope):
        kind = scaling.kind
        return [] if kind == "default" else [f"{family} extends the context by YaRN: model.rope_scaling.kind is {kind}"]
    if scaling.attention_factor is not None:
        given = f"model.rope_scaling.attention_factor is {scaling.attention_factor}"
        return [f"{family} derives YaRN's attention factor from mscale and mscale_all_dim: {given}"]
    both = scaling.mscale, scaling.mscale_all_dim
    if both == (None, None) or all(both):
        return []
    given = f"model.rope_scaling has mscale {scaling.mscale}, mscale_all_dim {scaling.mscale_all_dim}"
    return [f"{family} needs YaRN's mscale and mscale_all_dim, both above 0, or neither: {given}"]


def layer_reasons(family: str, model: ModelConfig, moe: MoEConfig) -> list[str]:
    """Dense layers come first; shared experts are as wide as routed ones, and there is no refine stage."""
    found = []
    if moe.router.fine == "refine":
        found.append(f"{family} has no refine stage: moe.router.fine is refine")
    dense = dense_layers(model, moe)
    if dense != list(range(len(dense))):
        found.append(f"{family} has dense layers first, then none: moe.moe_layer_freq leaves layers {dense} dense")
    width, shared = expert_width(model, moe), moe.moe_shared_expert_intermediate_size
    if shared and shared % width:
        rule = f"has shared experts as wide as the routed ones ({width}) or a multiple"
        found.append(f"{family} {rule}: moe.moe_shared_expert_intermediate_size is {shared}")
    return found


def deepseek_config(
    architecture: str, model_type: str, model: ModelConfig, moe: MoEConfig, ids: SpecialIds, dtype: str
) -> dict[str, Any]:
    """The keys of both families that transformers, vLLM and llama.cpp read, but for the kind of router.

    ``head_dim`` is the rotary part of a head, as transformers derives it. A model without shared experts has one of
    zeros in the file, since transformers and vLLM build one in every layer.
    """
    attention, router, width = model.attention, moe.router, expert_width(model, moe)
    return {
        **stock_config(architecture, model_type, _with_mscales(model), ids, dtype),
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": attention.qk_pos_emb_head_dim,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_head_dim,
        "qk_rope_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_intermediate_size": width,
        "n_shared_experts": (moe.moe_shared_expert_intermediate_size or width) // width,
        "first_k_dense_replace": len(dense_layers(model, moe)),
        "moe_layer_freq": 1,
        "n_group": router.num_groups or 1,
        "topk_group": router.group_topk or 1,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.scaling_factor,
        "output_router_logits": False,
        "ep_size": 1,
        "pretraining_tp": 1,
    }


def _with_mscales(model: ModelConfig) -> ModelConfig:
    """YaRN with both mscales said: 1 and 0 are what every engine computes without them."""
    scaling = model.rope_scaling
    if not isinstance(scaling, YarnRope) or scaling.mscale is not None:
        return model
    said = scaling.model_copy(update={"mscale": 1.0, "mscale_all_dim": 0.0})
    return model.model_copy(update={"rope_scaling": said})


def parse_deepseek(config: dict[str, Any], router: dict[str, Any]) -> dict[str, Any]:
    """The sections for a config.json with every default filled in, but for the router, of which the families know.

    Raises ConfigError naming the key that asks for what our model has not, or about which engines disagree.
    """
    heads = whole_number(config, "num_attention_heads")
    require(config, {"rms_norm_eps": LATENT_NORM_EPSILON, "num_key_value_heads": heads, "moe_layer_freq": 1})
    rank, width = config["q_lora_rank"], whole_number(config, "moe_intermediate_size")
    attention = {
        "kind": "latent",
        "q_lora_rank": None if rank is None else whole_number(config, "q_lora_rank"),
        "kv_lora_rank": whole_number(config, "kv_lora_rank"),
        "qk_head_dim": whole_number(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": whole_number(config, "qk_rope_head_dim"),
        "v_head_dim": whole_number(config, "v_head_dim"),
    }
    model = parse_llama(config) | {
        "attention": attention,
        "num_query_groups": None,
        "kv_channels": None,
        "qk_layernorm": False,
        "rotary_interleaved": True,
    }
    model["rope_scaling"] = _without_idle_mscales(model["rope_scaling"])
    dense = whole_number(config, "first_k_dense_replace", least=0)
    moe = {
        "num_experts": whole_number(config, "n_routed_experts"),
        "moe_router_topk": whole_number(config, "num_experts_per_tok"),
        "moe_ffn_hidden_size": width,
        **parse_shared(config, "n_shared_experts", width),
        **parse_layers([layer >= dense for layer in range(model["num_layers"])], "first_k_dense_replace"),
        "router": router | {"scaling_factor": config["routed_scaling_factor"]},
    }
    return {"model": model, "moe": moe}


def _without_idle_mscales(scaling: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_with_mscales``: YaRN without the pair that changes nothing."""
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale in (None, 1) and not all_dim:
        return {key: value for key, value in scaling.items() if key not in ("mscale", "mscale_all_dim")}
    if mscale and all_dim:
        return scaling
    given = f"rope_scaling has mscale {mscale} and mscale_all_dim {all_dim}"
    raise ConfigError(f"{given}, about which engines disagree; megatron_ds has both above 0, or neither")
