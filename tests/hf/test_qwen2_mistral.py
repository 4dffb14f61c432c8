"""qwen2 and mistral both ways: which models they hold, what stands in their files, and stock models read back.

Exports of their tiny models are compared with stock transformers in ``test_export_parity.py``; here are other shapes,
and models that stock transformers made.
"""

import json

import pytest
import torch
from importing import difference, imported, save_stock
from reexporting import reexport, same_bytes, tensors_of
from safetensors.torch import load_file
from tiny_checkpoint import (
    FULL,
    HYBRID,
    LATENT,
    LENGTH,
    MODELS,
    WINDOW,
    export_tiny,
    load_stock,
    random_tokens,
    run_config,
    save_tiny,
)
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen2Config

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets import TARGETS, choose_target
from megatron_ds.hf.targets.common import SpecialIds, layer_types, sliding_window

TOLERANCE = 2e-5
FAMILIES = ["qwen2", "mistral"]
IDS = SpecialIds(bos=1, eos=2, pad=None)
UNTIED = {"untie_embeddings_and_output_weights": True}
SLIDING = {"attention": HYBRID | {"pattern": "L"}}
YARN = {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
each_family = pytest.mark.parametrize("family", FAMILIES)


def dense(family: str, **settings) -> ModelConfig:
    """The tiny model section of a family, with changes."""
    sizes = {
        "num_layers": 5, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2,
        "seq_length": 64, "vocab_size": 301,
    }  # fmt: skip
    return ModelConfig.model_validate(sizes | MODELS[family] | settings)


def written(family: str, **settings) -> dict:
    """config.json of such a model."""
    return json.loads(json.dumps(TARGETS[family].config(dense(family, **settings), None, IDS, "float32")))


# --- which models they hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("qwen2", {"add_qkv_bias": False}, "qwen2 always has a bias on queries, keys and values alone: model.add_qkv_"),
        ("qwen2", {"qk_layernorm": True}, "qwen2 has no query and key norm: model.qk_layernorm is true"),
        ("qwen2", {"rotary_interleaved": True}, "qwen2 turns channels half a head apart as pairs: model.rotary_inter"),
        ("qwen2", {"kv_channels": 16}, "divides the width among the heads: there are 4 heads of 16 for model.hidden_s"),
        ("qwen2", {"attention": {"kind": "soft_gate"}}, "qwen2 has no gate on far keys: model.attention.kind is soft"),
        (
            "mistral",
            {"add_qkv_bias": True},
            "mistral has no bias on queries, keys and values alone: model.add_qkv_bias",
        ),
        ("mistral", {"qk_layernorm": True}, "mistral has no query and key norm: model.qk_layernorm is true"),
        ("mistral", {"rotary_interleaved": True}, "mistral turns channels half a head apart as pairs: model.rotary_in"),
        ("mistral", {"attention": HYBRID}, "mistral has one window for all layers, or none: model.attention.pattern"),
        ("mistral", {"attention": LATENT}, "mistral has no latent attention: model.attention.kind is latent"),
    ],
)
def test_a_model_that_the_family_cannot_express_is_refused(family, settings, reason):
    assert not TARGETS[family].reasons(dense(family), None)
    found = TARGETS[family].reasons(dense(family, **settings), None)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize("name", TARGETS)
def test_a_family_has_the_bias_or_has_not(name):
    """Those with experts, too."""
    config = run_config(**MODELS[name] | {"add_qkv_bias": name != "qwen2"})
    ours = RunConfig.model_validate(config).megatron_ds
    [reason] = TARGETS[name].reasons(ours.model, ours.moe)
    assert reason.startswith(
        f"{name} {'always has a' if name == 'qwen2' else 'has no'} bias on queries, keys and values"
    )


def test_only_qwen2_holds_the_bias():
    assert choose_target(dense("qwen2")).model_type == "qwen2"
    with pytest.raises(ConfigError, match=r"--target llama: llama has no bias on .*; use --target qwen2$"):
        choose_target(dense("qwen2"), requested="llama")


# --- what stands in the files ---------------------------------------------------------------------------------------


def stock_shapes(directory) -> dict:
    """Names and shapes of a stock model built from config.json alone; one of two tied tensors is not stored."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


VARIANTS = {
    "qwen2, full, untied": ("qwen2", {"attention": FULL} | UNTIED),
    "qwen2, all layers slide": ("qwen2", SLIDING | {"num_query_groups": 1}),
    "qwen2, yarn, no groups": ("qwen2", YARN | {"num_query_groups": 4, "norm_epsilon": 1e-3}),
    "mistral, full": ("mistral", {"attention": FULL, "num_query_groups": 1}),
    "mistral, window 1, untied": ("mistral", {"attention": HYBRID | {"pattern": "L", "window": 1}} | UNTIED),
    "mistral, yarn": ("mistral", YARN | {"kv_channels": 10}),
}


@pytest.mark.parametrize(("family", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_other_shapes_are_the_stock_model(tmp_path, family, settings):
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[family] | settings)
    directory = export_tiny(tiny, tmp_path / "model", target=family)
    weights = load_file(directory / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == stock_shapes(directory)
    token_BS = random_tokens()
    for attention in ("eager", "sdpa"):
        with torch.no_grad():
            logits_BSV = load_stock(directory, attention)(token_BS).logits
        assert (logits_BSV - tiny.logits(token_BS)).abs().max() <= TOLERANCE


@each_family
def test_window_edge(tmp_path, family):
    """One local layer: the key at distance W matters to a query, the key at distance W + 1 does not."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[family] | SLIDING | {"num_layers": 1})
    stock = load_stock(export_tiny(tiny, tmp_path / "model", target=family))
    query, token_1S = LENGTH - 1, random_tokens(batch=1)
    with torch.no_grad():
        before_V = stock(token_1S).logits[0, query]
        for distance, matters in ((WINDOW, True), (WINDOW + 1, False)):
            changed_1S = token_1S.clone()
            changed_1S[0, query - distance] = (changed_1S[0, query - distance] + 1) % 301
            assert torch.equal(stock(changed_1S).logits[0, query], before_V) is not matters


def test_the_keys_of_windows():
    keys = ("use_sliding_window", "sliding_window", "max_window_layers")
    mixed, full = written("qwen2"), written("qwen2", attention=FULL)
    assert tuple(mixed[key] for key in keys) == (True, WINDOW + 1, 5)
    assert tuple(full[key] for key in keys) == (False, None, 5)
    assert [kind[0] for kind in mixed["layer_types"]] == ["s", "s", "f", "s", "s"]
    sliding, full = written("mistral"), written("mistral", attention=FULL)
    assert (sliding["sliding_window"], full["sliding_window"]) == (WINDOW + 1, None)
    assert "layer_types" not in sliding, "transformers warns of them"
    for config in (mixed, sliding):
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        assert config["torch_dtype"] == config["dtype"] == "float32"


@each_family
def test_an_export_proves_itself(tmp_path, tokenizer_directory, family):
    tiny = save_tiny(tmp_path / "checkpoints", tokenizer=tokenizer_directory, **MODELS[family])
    directory = export_tiny(tiny, tmp_path / "model", target=family, verify=True, precision="bf16")
    checks = json.loads((directory / "export_report.json").read_text())["checks"]
    assert [check["passed"] for check in checks] == [True, True, True, None, True, True]


# --- reading them back ----------------------------------------------------------------------------------------------


def meaning(model: ModelConfig) -> dict:
    """What decides what a model computes, whichever way it was said."""
    keys = ("num_layers", "hidden_size", "ffn_size", "num_attention_heads", "num_kv_heads", "head_dim", "vocab_size",
            "add_qkv_bias", "qk_layernorm", "rotary_base", "rotary_interleaved", "rope_scaling", "norm_epsilon",
            "untie_embeddings_and_output_weights")  # fmt: skip
    return {key: getattr(model, key) for key in keys} | {"layers": layer_types(model), "window": sliding_window(model)}


def parsed(family: str, config: dict) -> ModelConfig:
    sections = TARGETS[family].parse(config)
    assert set(sections) == {"model"}
    return ModelConfig.model_validate(sections["model"])


@pytest.mark.parametrize("spelling", ["both", "transformers 5", "older"])
@pytest.mark.parametrize(("family", "settings"), [*VARIANTS.values(), ("qwen2", {}), ("mistral", {})])
def test_what_is_written_is_read_back(family, settings, spelling):
    config = written(family, **settings)
    dropped = {"transformers 5": ("rope_theta", "rope_scaling", "torch_dtype"), "older": ("rope_parameters", "dtype")}
    for key in dropped.get(spelling, ()):
        del config[key]
    assert meaning(parsed(family, config)) == meaning(dense(family, **settings))


def qwen2(**settings) -> dict:
    return Qwen2Config(num_hidden_layers=4, hidden_size=64, num_attention_heads=8, **settings).to_dict()


@pytest.mark.parametrize(
    ("use", "window", "first", "layers"),
    [(False, 9, 0, "GGGG"), (True, None, 0, "GGGG"), (True, 9, 4, "GGGG"), (True, 9, 1, "GLLL"), (True, 9, 0, "LLLL")],
)
def test_qwen2_slides_from_max_window_layers_on(use, window, first, layers):
    """With and without layer_types, which transformers 5 always writes."""
    config = qwen2(use_sliding_window=use, sliding_window=window, max_window_layers=first, num_key_value_heads=2)
    older = {key: value for key, value in config.items() if key != "layer_types"} | {"sliding_window": window}
    for given in (config, older):
        model = parsed("qwen2", given)
        assert "".join("L" if kind == "sliding_attention" else "G" for kind in layer_types(model)) == layers
        assert sliding_window(model) == (9 if "L" in layers else None)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings",
         "vocab_size")  # fmt: skip


@pytest.mark.parametrize(("family", "stock"), [("qwen2", Qwen2Config), ("mistral", MistralConfig)])
def test_keys_that_are_not_there_have_the_familys_defaults(family, stock):
    defaults = stock().to_dict()
    assert parsed(family, {key: defaults[key] for key in SIZES}) == parsed(family, defaults)
    assert parsed(family, defaults).num_kv_heads == defaults["num_key_value_heads"]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, 'hidden_act is "gelu", but megatron_ds has only "silu"'),
        ("qwen2", {"layer_types": ["chunked_attention"] * 5}, "layer_types has chunked_attention"),
        ("qwen2", {"use_sliding_window": False}, "layer_types has sliding_attention, but sliding_window is not set"),
        ("mistral", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is longrope"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 5},
            "layer_types is .*full_attention.* has only .*sliding_att",
        ),
        ("mistral", {"num_hidden_layers": None}, "num_hidden_layers is null"),
    ],
)
def test_what_our_model_has_not_is_refused_by_name(family, change, message):
    with pytest.raises(ConfigError, match=message):
        TARGETS[family].parse(written(family) | change)


# --- models that transformers made ----------------------------------------------------------------------------------

SLIDES = {"sliding_window": WINDOW + 1}
TIED = {"tie_word_embeddings": True}
STOCK = {
    "qwen2, two layers slide": ("qwen2", SLIDES | {"head_dim": 12, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, full, tied": ("qwen2", TIED | {"head_dim": 12, "num_key_value_heads": 1, "rope_theta": 1e6}),
    "mistral, window": ("mistral", SLIDES | {"head_dim": 10}),
    "mistral, full, tied": ("mistral", TIED | {"hidden_size": 50, "sliding_window": None}),
}


@pytest.mark.parametrize(("family", "settings"), STOCK.values(), ids=STOCK)
def test_a_stock_model_is_imported_and_comes_back(tmp_path, family, settings):
    """Logits beyond the window, in either order of a head's channels, biases included; and every bit of the file."""
    stock = save_stock(tmp_path / "stock", family, **settings)
    for interleaved in (False, True):
        decoder = imported(tmp_path / "stock", rotary_interleaved=interleaved)
        assert difference(stock, decoder, random_tokens()) <= TOLERANCE
    back = reexport(tmp_path / "stock", tmp_path / "first")
    assert same_bytes(tensors_of(tmp_path / "stock"), tensors_of(back))
    again = reexport(back, tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (back / name).read_bytes()
