"""Which models deepseek_v3 and deepseek_v2 can hold, why not others, and every key that their engines read."""

import json

import pytest

from megatron_ds.config.load import load_config
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets import TARGETS, choose_target, place_mtp
from megatron_ds.hf.targets.common import SpecialIds

IDS = SpecialIds(bos=1, eos=2, pad=None)
LATENT = {
    "kind": "latent", "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 10, "qk_pos_emb_head_dim": 6,
    "v_head_dim": 14,
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROUTERS = {
    "deepseek_v3": {"kind": "sigmoid"},
    "deepseek_v2": {"kind": "softmax", "fine": "none", "norm_topk_prob": False},
}


def decoder(**settings) -> ModelConfig:
    """A small model section that both families hold."""
    sizes = {
        "num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99, "ffn_hidden_size": 160,
        "attention": LATENT, "qk_layernorm": False, "rotary_interleaved": True,
        "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    return ModelConfig.model_validate(sizes | settings)


def experts(family, router=None, **settings) -> MoEConfig:
    """A small moe section that the family holds, but for the given settings."""
    sizes = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    return MoEConfig.model_validate(sizes | settings | {"router": ROUTERS[family] | (router or {})})


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize(
    ("model", "moe"),
    [
        ({}, {}),
        ({"attention": LATENT | {"q_lora_rank": None}}, {"moe_layer_freq": [0, 0, 1, 1, 1]}),
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, {"moe_shared_expert_intermediate_size": 96}),
        ({"rope_scaling": YARN, "untie_embeddings_and_output_weights": False}, {"moe_ffn_hidden_size": None}),
        ({"mtp_num_layers": 2}, {"router": {"num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}}),
    ],
)
def test_which_models_a_family_holds(family, model, moe):
    """Only it: no other family has latent attention, and the router tells the two apart."""
    model, moe = decoder(**model), experts(family, **moe)
    assert [name for name, target in TARGETS.items() if not target.reasons(model, moe)] == [family]
    assert choose_target(model, moe).model_type == family


def test_the_defaults_of_v3_go_to_deepseek_v3():
    argv = ["--generation", "v3", "--vocab-size", "99", "--set", "megatron_ds.data.eod_id=0", "--set",
            "megatron_ds.data.data_path=[\"corpus\"]", "--num-layers", "4"]  # fmt: skip
    ours = load_config(argv, world_size=1).config.megatron_ds
    assert choose_target(ours.model, ours.moe).model_type == "deepseek_v3"


BOTH = [
    ({"attention": {"kind": "full"}}, {}, "has latent attention: model.attention.kind is full"),
    (
        {"rotary_interleaved": False},
        {},
        "turns neighbouring channels as pairs: model.rotary_interleaved is false (train with model.rotary_interleaved "
        "true)",
    ),
    ({"qk_layernorm": True}, {}, "has no norm on query and key heads: model.qk_layernorm is true (train without)"),
    ({"norm_epsilon": 1e-5}, {}, "in the norms of its latent vectors, so in all: model.norm_epsilon is 1e-05"),
    ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, {}, "extends the context by YaRN: model.rope_scaling.kind"),
    ({"rope_scaling": YARN | {"attention_factor": 0.7}}, {}, "model.rope_scaling.attention_factor is 0.7"),
    ({"rope_scaling": YARN | {"mscale": 0.7}}, {}, "neither: model.rope_scaling has mscale 0.7, mscale_all_dim None"),
    ({"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 1.0}}, {}, "has mscale 0.0, mscale_all_dim 1.0"),
    ({}, {"moe_layer_freq": 2}, "has dense layers first, then none: moe.moe_layer_freq leaves layers [1, 3] dense"),
    ({}, {"moe_layer_freq": [0, 1, 1, 1, 0]}, "moe.moe_layer_freq leaves layers [0, 4] dense"),
    ({}, {"moe_shared_expert_intermediate_size": 48}, "(32) or a multiple: moe.moe_shared_expert_intermediate_size is"),
    ({}, {"router": {"fine": "refine"}}, "has no refine stage: moe.router.fine is refine"),
]  # fmt: skip
ONE = [
    ("deepseek_v3", {}, {"router": {"kind": "softmax"}}, "scores experts by sigmoid: moe.router.kind is softmax"),
    ("deepseek_v3", {}, {"num_experts": 1, "moe_router_topk": 1}, "by its two best experts: moe.num_experts is 1"),
    ("deepseek_v2", {}, {"router": {"kind": "sigmoid"}}, "scores experts by softmax: moe.router.kind is sigmoid"),
    ("deepseek_v2", {}, {"router": {"fine": "bias"}}, "has no balancing bias: moe.router.fine is bias"),
    ("deepseek_v2", {}, {"router": {"norm_topk_prob": True}}, "never normalises the experts' weights: moe.router.norm"),
    ("deepseek_v2", {"hidden_size": 66}, {}, "needs a width that the heads divide: model.hidden_size is 66"),
]


@pytest.mark.parametrize(
    ("family", "model", "moe", "reason"), [*((family, *case) for case in BOTH for family in ROUTERS), *ONE]
)
def test_a_family_refuses_with_the_setting_and_its_value(family, model, moe, reason):
    """Each model differs from one that the family holds in one setting, and the family says so."""
    model, moe = decoder(**model), experts(family, **moe)
    found = TARGETS[family].reasons(model, moe)
    assert len(found) == 1 and found[0].startswith(f"{family} ") and reason in found[0]
    with pytest.raises(ConfigError) as error:
        choose_target(model, moe, family)
    assert found[0] in str(error.value)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "qwen3_moe", "mixtral", "mds_moe"])
def test_other_families_have_no_latent_attention(family):
    found = TARGETS[family].reasons(decoder(), experts("deepseek_v3"))
    assert f"{family} has no latent attention: model.attention.kind is latent" in found


# --- config.json ----------------------------------------------------------------------------------------------------


SHARED = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0, "attention_bias": False,
    "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "dtype": "bfloat16", "torch_dtype": "bfloat16", "rope_theta": 10000.0,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 2, "moe_layer_freq": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "output_router_logits": False, "ep_size": 1, "pretraining_tp": 1,
}  # fmt: skip
OWN = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "rope_interleave": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_router_dtype": "float32",
        "num_nextn_predict_layers": 1,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "mlp_bias": False,
        "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    },
}  # fmt: skip
SCALING = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("untied", [True, False])
def test_every_key_of_config_json(family, untied):
    """A tied model is written untied."""
    mscales = {"mscale": 0.7, "mscale_all_dim": 0.8}
    model = decoder(rope_scaling=YARN | mscales, mtp_num_layers=1, untie_embeddings_and_output_weights=untied)
    router = {"num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}
    moe = experts(family, router, moe_shared_expert_intermediate_size=64, moe_layer_freq=[0, 0, 1, 1, 1])
    config = TARGETS[family].config(model, moe, IDS, "bfloat16")
    assert config.pop("rope_parameters") == SCALING | mscales | {"rope_theta": 10000.0}
    assert config.pop("rope_scaling") == SCALING | mscales | {"type": "yarn"}
    assert config == SHARED | OWN[family]
    json.dumps(config)


@pytest.mark.parametrize("family", ROUTERS)
def test_what_a_plain_model_says(family):
    """Nothing is left to a default that an engine may not have."""
    model = decoder(attention=LATENT | {"q_lora_rank": None}, rope_scaling=YARN)
    config = TARGETS[family].config(model, experts(family), IDS, "float32")
    said = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    assert said.items() <= config.items()
    assert (config["rope_parameters"]["mscale"], config["rope_parameters"]["mscale_all_dim"]) == (1.0, 0.0)
    assert config.get("num_nextn_predict_layers") == (0 if family == "deepseek_v3" else None)
    assert config["topk_method"] == ("noaux_tc" if family == "deepseek_v3" else "greedy")


# --- where MTP blocks go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "model", "requested", "place"),
    [
        ("deepseek_v3", {"num_layers": 61, "mtp_num_layers": 1}, "auto", "inline"),
        ("deepseek_v3", {"num_layers": 61, "mtp_num_layers": 2}, "auto", "separate"),
        ("deepseek_v3", {"mtp_num_layers": 1}, "auto", "separate"),
        ("deepseek_v3", {"mtp_num_layers": 1}, "inline", "inline"),
        ("deepseek_v3", {"mtp_num_layers": 1}, "drop", "drop"),
        ("deepseek_v3", {"num_layers": 61, "mtp_num_layers": 1}, "separate", "separate"),
        ("deepseek_v3", {}, "auto", "drop"),
        ("deepseek_v2", {"mtp_num_layers": 1}, "auto", "drop"),
        ("ernie4_5_moe", {"mtp_num_layers": 1}, "drop", "drop"),
    ],
)
def test_where_blocks_go(family, model, requested, place):
    assert place_mtp(TARGETS[family], decoder(**model), requested) == place


@pytest.mark.parametrize("requested", ["inline", "separate"])
@pytest.mark.parametrize(
    ("family", "blocks", "reason"),
    [
        ("deepseek_v2", 2, "deepseek_v2 has no place for MTP blocks: model.mtp_num_layers is 2"),
        ("deepseek_v3", 0, "there is no block: model.mtp_num_layers is 0"),
    ],
)
def test_blocks_that_cannot_go_there(family, blocks, reason, requested):
    with pytest.raises(ConfigError) as error:
        place_mtp(TARGETS[family], decoder(mtp_num_layers=blocks), requested)
    assert str(error.value) == f"--mtp {requested}: {reason}; use --mtp drop, or leave it out"
