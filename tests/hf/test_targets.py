"""Which dense target can hold which model, why another cannot, and what config.json says; all without torch."""

import pytest

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets import TARGETS, choose_target
from megatron_ds.hf.targets.common import SpecialIds, layer_types, sliding_window

IDS = SpecialIds(bos=1, eos=2, pad=None)
FULL, GATE = {"kind": "full"}, {"kind": "soft_gate", "window": 9}
DENSE = [name for name, target in TARGETS.items() if not target.has_experts]
HYBRID = {"kind": "hybrid", "pattern": "LLG", "window": 9}


def dense(**settings) -> ModelConfig:
    """A small model section."""
    return ModelConfig.model_validate(
        {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99} | settings
    )


@pytest.mark.parametrize(
    ("attention", "qk_layernorm", "able"),
    [
        (FULL, True, ["qwen3"]),
        (HYBRID, True, ["qwen3"]),
        (FULL, False, ["llama", "cwm", "mistral"]),
        (HYBRID, False, ["cwm"]),
        (HYBRID | {"pattern": "L"}, False, ["cwm", "mistral"]),
        (HYBRID | {"pattern": "G"}, False, ["llama", "cwm", "mistral"]),
        (GATE, True, ["mds_dense"]),
        (GATE, False, ["mds_dense"]),
    ],
)
def test_which_targets_hold_a_model(attention, qk_layernorm, able):
    model = dense(attention=attention, qk_layernorm=qk_layernorm)
    assert [name for name, target in TARGETS.items() if not target.reasons(model, None)] == able
    assert choose_target(model).model_type == able[0]
    for name in able:
        assert choose_target(model, None, name).model_type == name


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (
            "llama",
            {"attention": HYBRID, "qk_layernorm": False},
            "--target llama: llama has no per-layer windows: model.attention.kind is hybrid; use --target cwm",
        ),
        (
            "llama",
            {"attention": GATE},
            "--target llama: llama has no gate on far keys: model.attention.kind is soft_gate; "
            "llama has no query and key norm: model.qk_layernorm is true; use --target mds_dense",
        ),
        (
            "qwen3",
            {"attention": FULL, "qk_layernorm": False},
            "--target qwen3: qwen3 always normalises queries and keys: model.qk_layernorm is false; "
            "use --target llama or cwm or mistral",
        ),
        (
            "mds_dense",
            {"attention": FULL},
            "--target mds_dense: mds_dense is for the soft gate only: model.attention.kind is full; use --target qwen3",
        ),
        (
            "qwen3",
            {"attention": HYBRID, "rotary_interleaved": True},
            "--target qwen3: qwen3 turns channels half a head apart as pairs: model.rotary_interleaved is true; "
            "no target can express this model",
        ),
        (
            "mixtral",
            {"attention": FULL},
            "--target mixtral: mixtral is for models with experts: the configuration has no moe section; "
            "use --target qwen3",
        ),
        (
            "gpt2",
            {},
            "--target gpt2: unknown; choose auto, qwen3, llama, cwm, mistral, qwen2, mds_dense, ernie4_5_moe, "
            "qwen3_moe, mixtral, deepseek_v3, deepseek_v2, mds_moe",
        ),
    ],
)
def test_a_target_is_refused_with_its_reasons_and_the_way_out(target, settings, message):
    with pytest.raises(ConfigError) as error:
        choose_target(dense(**settings), None, target)
    assert str(error.value) == message


def test_auto_names_every_reason_when_no_target_can():
    """Only qwen3 and mistral take a width that the heads do not divide; one needs query/key norm, one equal layers."""
    model = dense(hidden_size=66, kv_channels=16, attention=HYBRID, qk_layernorm=False)
    with pytest.raises(
        ConfigError, match="--target auto: no target can express this model: qwen3 always normalises"
    ) as error:
        choose_target(model)
    assert "llama needs a width that the heads divide: model.hidden_size is 66" in str(error.value)
    assert "moe" not in str(error.value), "families for experts have nothing to say"
    assert "mistral has one window for all layers, or none: model.attention.pattern is LLG" in str(error.value)
    assert "cwm needs" in str(error.value) and "mds_dense is for the soft gate only" in str(error.value)
    with pytest.raises(ConfigError, match="no target can express this model"):
        choose_target(model, None, "llama")


def test_the_pattern_repeats_over_the_depth_and_the_window_is_one_wider():
    model = dense(attention=HYBRID)
    assert [name[0] for name in layer_types(model)] == ["s", "s", "f", "s", "s"]
    assert sliding_window(model) == 10
    assert sliding_window(dense(attention=HYBRID | {"pattern": "GGGGGL"})) is None, "the pattern ends before its L"


@pytest.mark.parametrize("name", DENSE)
def test_no_setting_is_left_to_a_familys_default(name):
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    attention = GATE if name == "mds_dense" else HYBRID
    model = dense(rope_scaling=scaling, rotary_base=5e4, norm_epsilon=3e-6, attention=attention)
    config = TARGETS[name].config(model, None, IDS, "bfloat16")
    assert config["model_type"] == name and config["architectures"][0].endswith("ForCausalLM")
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["rope_theta"], rope["original_max_position_embeddings"]) == ("yarn", 5e4, 512)
    assert "attention_factor" not in rope, "unset, every loader computes the same one"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    assert (config["head_dim"], config["rms_norm_eps"], config["vocab_size"]) == (16, 3e-6, 99)
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert config.get("local_window", config.get("sliding_window", 10)) == 10

    older = {key: config.get(key) for key in ("torch_dtype", "rope_theta", "rope_scaling")}
    if name == "mds_dense":  # its code needs transformers 5
        assert older == dict.fromkeys(older)
    else:
        assert older == {"torch_dtype": "bfloat16", "rope_theta": 5e4, "rope_scaling": older["rope_scaling"]}
        assert older["rope_scaling"] == {"type": "yarn"} | {key: rope[key] for key in rope if key != "rope_theta"}


def test_the_unscaled_rotary_embedding_has_no_rope_scaling():
    config = TARGETS["llama"].config(dense(), None, IDS, "float32")
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_qwen3_says_that_it_slides():
    """With use_sliding_window left at false, transformers drops the window and fails."""
    hybrid = TARGETS["qwen3"].config(dense(attention=HYBRID), None, IDS, "float32")
    assert (hybrid["use_sliding_window"], hybrid["max_window_layers"]) == (True, 5)
    full = TARGETS["qwen3"].config(dense(attention=FULL), None, IDS, "float32")
    assert (full["use_sliding_window"], full["sliding_window"]) == (False, None)


def test_mds_dense_never_names_the_keys_that_shrink_the_cache():
    config = TARGETS["mds_dense"].config(dense(attention=GATE), None, IDS, "float32")
    assert not {"sliding_window", "layer_types"} & set(config)
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
