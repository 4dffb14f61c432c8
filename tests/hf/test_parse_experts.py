"""config.json of every family with experts becomes our sections again, in either spelling, or is refused by name.

What transformers itself makes of a file is the oracle for keys that are not there.
"""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import HYBRID, LATENT, MODELS, run_config
from transformers import AutoConfig

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets import EXPERT_TARGETS, TARGETS
from megatron_ds.hf.targets.common import SpecialIds, layer_types, sliding_window
from megatron_ds.hf.targets.experts import expert_width

IDS = SpecialIds(bos=1, eos=2, pad=None)
FAMILIES = [target.model_type for target in EXPERT_TARGETS]
STOCK = [name for name in FAMILIES if name != "mds_moe"]
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def sections(model: dict, moe: dict) -> tuple[ModelConfig, MoEConfig]:
    return ModelConfig.model_validate(model), MoEConfig.model_validate(moe)


def tiny(family: str, **changes) -> tuple[ModelConfig, MoEConfig]:
    """The tiny model of a family; ``moe`` and ``router`` change single settings of theirs, all others the model's."""
    moe = MODELS[family]["moe"] | changes.pop("moe", {})
    moe["router"] = {"kind": "softmax"} | moe.get("router", {}) | changes.pop("router", {})
    ours = run_config(**MODELS[family] | changes | {"moe": moe})["megatron_ds"]
    return sections(ours["model"], ours["moe"])


def written(family: str, **changes) -> dict:
    """config.json of the tiny model of a family, as it is after a way through a file."""
    return json.loads(json.dumps(TARGETS[family].config(*tiny(family, **changes), IDS, "float32")))


def parsed(family: str, config: dict) -> tuple[ModelConfig, MoEConfig]:
    found = TARGETS[family].parse(config)
    return sections(found["model"], found["moe"])


def meaning(model: ModelConfig, moe: MoEConfig) -> dict:
    """Everything that decides what a model computes, whichever way it was said."""
    router = moe.router
    refines = router.fine == "refine"
    return {
        "sizes": (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_size),
        "heads": (model.num_kv_heads, None if model.attention.kind == "latent" else model.head_dim),
        "dense": [model.ffn_size for layer in range(model.num_layers) if not moe.is_moe_layer(layer)],
        "attention": (layer_types(model), sliding_window(model)),
        "latent": model.attention if model.attention.kind == "latent" else None,
        "rotary": (model.rotary_base, model.rotary_interleaved, model.rope_scaling, model.max_positions),
        "norms": (model.qk_layernorm, model.norm_epsilon),
        "mtp": model.mtp_num_layers,
        "sparse": [moe.is_moe_layer(layer) for layer in range(model.num_layers)],
        "experts": (moe.num_experts, moe.moe_router_topk, expert_width(model, moe)),
        "router": (router.kind, router.norm_topk_prob, router.scaling_factor, refines),
        "candidates": (router.refine_candidates or 2 * moe.moe_router_topk) if refines else None,
        "groups": (router.num_groups, router.group_topk),
        "shared": moe.moe_shared_expert_intermediate_size,
        "tied": not model.untie_embeddings_and_output_weights,
    }


# --- what we write ----------------------------------------------------------------------------------------------------


WINDOW = {"attention": HYBRID | {"pattern": "L"}}
LINEAR = {"rope_scaling": {"kind": "linear", "factor": 3.0}, "max_position_embeddings": 192}
LLAMA3 = {"rope_scaling": {"kind": "llama3", "original_max_position_embeddings": 32}, "norm_epsilon": 3e-6}
UNTIED = {"untie_embeddings_and_output_weights": True}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    *((family, LINEAR | UNTIED) for family in ("ernie4_5_moe", "qwen3_moe", "mixtral", "mds_moe")),
    *((family, LLAMA3) for family in ("ernie4_5_moe", "qwen3_moe", "mixtral", "mds_moe")),
    ("ernie4_5_moe", {"num_query_groups": None, "kv_channels": None, "moe": {"moe_layer_freq": [0, 1, 0, 1]}}),
    ("ernie4_5_moe", {"moe": {"moe_layer_freq": [0, 1, 1, 0], "moe_shared_expert_intermediate_size": None}}),
    ("qwen3_moe", {"moe": {"moe_layer_freq": 3}, "router": {"norm_topk_prob": False}}),
    ("qwen3_moe", WINDOW | {"moe": {"moe_layer_freq": 1}}),
    ("mixtral", WINDOW | {"moe": {"moe_ffn_hidden_size": None}}),
    ("mds_moe", {"qk_layernorm": False, "rotary_interleaved": False, "moe": {"moe_layer_freq": 1}}),
    (
        "mds_moe",
        {
            "moe": {"moe_shared_expert_intermediate_size": None},
            "router": {
                "kind": "sigmoid", "fine": "bias", "refine_candidates": None, "num_groups": 3, "group_topk": 2,
                "norm_topk_prob": False, "scaling_factor": 2.5,
            },
        },
    ),
    *((family, {"attention": LATENT | {"q_lora_rank": None}}) for family in ("deepseek_v2", "deepseek_v3")),
    *((family, {"rope_scaling": YARN}) for family in ("deepseek_v2", "deepseek_v3")),
    (
        "deepseek_v2",
        {
            "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 20.0, "beta_slow": 2.0},
            "router": {"num_groups": None, "group_topk": None},
            "moe": {"moe_layer_freq": 1},
        },
    ),
    (
        "deepseek_v3",
        {
            "mtp_num_layers": 2,
            "router": {"num_groups": None, "group_topk": None, "norm_topk_prob": False},
            "moe": {"moe_layer_freq": [0, 0, 0, 1], "moe_shared_expert_intermediate_size": 40},
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_what_a_family_writes_is_read_back(family, changes):
    ours = tiny(family, **changes)
    assert TARGETS[family].reasons(*ours) == [], "a model of the family"
    config = TARGETS[family].config(*ours, IDS, "float32")
    found = parsed(family, json.loads(json.dumps(config)))
    assert meaning(*found) == meaning(*ours)
    assert TARGETS[family].config(*found, IDS, "float32") == config


FREE = {
    "ernie4_5_moe": {"shared", "interval"},
    "qwen3_moe": {"norm_topk_prob", "any_layer"},
    "mixtral": set(),
    "deepseek_v3": {"shared", "prefix", "norm_topk_prob", "scaling_factor", "groups"},
    "deepseek_v2": {"shared", "prefix", "scaling_factor", "groups"},
    "mds_moe": {"shared", "any_layer", "norm_topk_prob", "scaling_factor", "groups", "pairs"},
}
"""What the models of a family differ in, beside their sizes."""


@st.composite
def models(draw):
    """(family, model, moe): anything that the family can hold."""
    family = draw(st.sampled_from(FAMILIES))
    free, base, layers = FREE[family], dict(MODELS[family]), draw(st.integers(1, 6))

    def choose(name: str, *choices, otherwise):
        return draw(st.sampled_from(choices)) if name in free else otherwise

    first, step = draw(st.integers(0, layers - 1)), draw(st.integers(1, 3))
    sparse = [layer >= first for layer in range(layers)] if "prefix" in free else [True] * layers
    if "any_layer" in free:
        sparse = [layer == first or draw(st.booleans()) for layer in range(layers)]
    if "interval" in free:
        sparse = [layer >= first and (layer - first) % step == 0 for layer in range(layers)]
    router = {"kind": "softmax"} | base.pop("moe").get("router", {"fine": "bias"})
    groups = choose("groups", None, 2, 4, otherwise=None)
    router |= {
        "norm_topk_prob": choose("norm_topk_prob", True, False, otherwise=router.get("norm_topk_prob", True)),
        "scaling_factor": choose("scaling_factor", 1.0, 2.5, otherwise=1.0),
        "num_groups": groups, "group_topk": groups and draw(st.integers(1, groups)),
    }  # fmt: skip
    moe = {
        "num_experts": 8, "moe_router_topk": draw(st.integers(1, 2)), "moe_layer_freq": [int(has) for has in sparse],
        "moe_ffn_hidden_size": draw(st.sampled_from([24, None])), "router": router,
        "moe_shared_expert_intermediate_size": choose("shared", None, 144, 288, otherwise=None),
    }  # fmt: skip
    scaling = draw(st.sampled_from([{"kind": "default"}, YARN, YARN | {"mscale": 0.7, "mscale_all_dim": 0.8}]))
    model = base | {
        "num_layers": layers, "hidden_size": 64, "ffn_hidden_size": 144, "num_attention_heads": 4, "vocab_size": 99,
        "max_position_embeddings": draw(st.sampled_from([2048, 5000])), "rope_scaling": scaling,
        "rotary_base": draw(st.sampled_from([1e4, 5e5])), "untie_embeddings_and_output_weights": draw(st.booleans()),
        "mtp_num_layers": draw(st.integers(0, 2)),
        "rotary_interleaved": choose("pairs", True, False, otherwise=base.get("rotary_interleaved", False)),
    }  # fmt: skip
    return family, *sections(model, moe)


@settings(max_examples=300, deadline=None)
@given(models())
def test_so_is_every_model_that_it_can_hold(drawn):
    """Twice is as once: what a file cannot say (zeros for what a model has not, a tied head) it says of itself."""
    family, model, moe = drawn
    target = TARGETS[family]
    assume(not target.reasons(model, moe))
    config = target.config(model, moe, IDS, "float32")
    found = parsed(family, json.loads(json.dumps(config)))
    assert target.reasons(*found) == []
    assert target.config(*found, IDS, "float32") == config
    lost = {"mtp"} if target.mtp is None else set()
    lost |= {"tied"} if target.untied else set()
    lost |= {"shared"} if target.always_shared else set()
    held = {key: value for key, value in meaning(model, moe).items() if key not in lost}
    assert held.items() <= meaning(*found).items()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_one_window_for_all_layers_or_none(family):
    """A family with one ``sliding_window`` cannot mix it with full attention."""
    for pattern, window in (("L", 6), ("G", None)):
        config = written(family, attention=HYBRID | {"pattern": pattern})
        assert config["sliding_window"] == window and config.get("use_sliding_window") in (None, window is not None)
    reasons = TARGETS[family].reasons(*tiny(family, attention=HYBRID))
    assert reasons == [f"{family} has one window for all layers, or none: model.attention.pattern is LLG"]


# --- what others write ------------------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 5, "num_attention_heads": 8,
    "max_position_embeddings": 640,
}  # fmt: skip
LEAST = {"deepseek_v2": {"num_experts_per_tok": 3}, "deepseek_v3": {"num_key_value_heads": None}}
"""Keys for which a family has no default, or one that does not fit these sizes."""


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rope_theta": 12345.0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}},
    ],
)
def test_keys_that_are_not_there_are_as_transformers_takes_them(family, more, tmp_path):
    """All that it makes of a sparse file, and what it writes, in its own spelling, say the same as the file."""
    config = SIZES | LEAST.get(family, {}) | more | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = AutoConfig.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    for full in (stock.to_dict(), said):
        assert meaning(*parsed(family, config)) == meaning(*parsed(family, full))


@pytest.mark.parametrize("family", STOCK)
def test_either_spelling_is_enough(family):
    """The keys of transformers 5 alone, or those of 4."""
    config = written(family, **({"rope_scaling": YARN} if "deepseek" in family else LINEAR))
    expected = meaning(*parsed(family, config))
    newer = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling", "num_experts")}
    older = {key: config[key] for key in config if key not in ("rope_parameters", "num_local_experts")}
    if family == "mixtral":  # this name never changed
        older["num_local_experts"] = older.pop("num_experts")
    assert meaning(*parsed(family, newer)) == meaning(*parsed(family, older)) == expected


def test_the_official_deepseek_v3():
    """As it was published: older spelling, quantized, keys of its own code."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    model, moe = parsed("deepseek_v3", config)
    assert TARGETS["deepseek_v3"].reasons(model, moe) == []
    assert (model.rope_scaling.factor, model.rope_scaling.mscale, model.mtp_num_layers) == (40, 1.0, 1)
    assert moe.moe_layer_freq == (0,) * 3 + (1,) * 58 and moe.moe_shared_expert_intermediate_size == 2048
    assert (moe.router.num_groups, moe.router.group_topk, moe.router.scaling_factor) == (8, 4, 2.5)


def test_a_greedy_router_does_not_look_at_groups():
    config = written("deepseek_v2") | {"topk_method": "greedy"}
    assert parsed("deepseek_v2", config)[1].router.num_groups is None


def test_layers_with_experts_by_qwens_step():
    config = written("qwen3_moe") | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert parsed("qwen3_moe", config)[1].moe_layer_freq == (0, 0, 0, 1)


def test_noise_and_losses_of_training_are_no_part_of_a_model():
    config = written("mixtral") | {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.02, "attention_dropout": 0.1}
    model, moe = parsed("mixtral", config)
    assert (model.attention_dropout, moe.moe_input_jitter_eps, moe.moe_aux_loss_coeff) == (0, 0, 0)


# --- what our model is not --------------------------------------------------------------------------------------------


REFUSED = [
    *((family, {"hidden_act": "gelu"}, 'hidden_act is "gelu"') for family in FAMILIES),
    *((family, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type") for family in FAMILIES),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is true"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers leaves no layer with experts"),
    ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts is 0, but must be an integer, 1 or more"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("mixtral", {"num_experts": "8"}, 'num_experts is "8"'),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias is true"),
    ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min is 0.1, but megatron_ds has only 1e-12"),
    ("ernie4_5_moe", {"moe_layer_start_index": 4}, "moe_layer_interval leaves no layer with experts"),
    ("ernie4_5_moe", {"moe_layer_end_index": -2}, "moe_layer_end_index is -2"),
    ("ernie4_5_moe", {"moe_num_shared_experts": None}, "moe_num_shared_experts is null"),
    *((family, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05") for family in ("deepseek_v2", "deepseek_v3")),
    *((family, {"num_key_value_heads": 2}, "num_key_value_heads is 2") for family in ("deepseek_v2", "deepseek_v3")),
    *((family, {"moe_layer_freq": 2}, "moe_layer_freq is 2") for family in ("deepseek_v2", "deepseek_v3")),
    *((family, {"attention_bias": True}, "attention_bias is true") for family in ("deepseek_v2", "deepseek_v3")),
    *((family, {"first_k_dense_replace": 4}, "first_k_dense_replace") for family in ("deepseek_v2", "deepseek_v3")),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func is "softmax"'),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy"'),
    ("deepseek_v3", {"n_group": None}, "n_group is null"),
    ("deepseek_v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"'),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"'),
    ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is null"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is true"),
    ("mds_moe", {"scoring_func": "tanh"}, 'scoring_func is "tanh"'),
    ("mds_moe", {"layer_types": ["chunked_attention"] * 4}, "layer_types has chunked_attention"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_one_key_is_refused_in_one_line(family, changes, message):
    with pytest.raises(ConfigError) as error:
        TARGETS[family].parse(written(family) | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mscales", [(0.7, None), (None, 0.7), (0.7, 0.0), (0.0, None)])
def test_engines_disagree_about_one_mscale(mscales):
    config = written("deepseek_v3", rope_scaling=YARN)
    config["rope_parameters"] |= dict(zip(("mscale", "mscale_all_dim"), mscales, strict=True))
    with pytest.raises(ConfigError, match=r"rope_scaling has mscale .* about which engines disagree"):
        TARGETS["deepseek_v3"].parse(config)
