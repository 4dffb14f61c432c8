"""A run that begins with a model: its settings are defaults, contradictions are told together."""

import json
from pathlib import Path

import pytest

from megatron_ds.config.load import load_config
from megatron_ds.errors import ConfigError

DATA = ["--data-path", "x", "--eod-id", "0"]
DENSE = {
    "generation": "v1",
    "model": {
        "num_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "vocab_size": 300,
        "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "qk_layernorm": False,
        "attention": {"kind": "hybrid", "pattern": "LG", "window": 9},
        "rotary_base": 5e5, "rope_scaling": {"kind": "linear", "factor": 2.0}, "rotary_interleaved": False,
    },
}  # fmt: skip
EXPERTS = {
    "generation": "v2",
    "model": DENSE["model"] | {"attention": {"kind": "full"}},
    "moe": {"num_experts": 4, "moe_layer_freq": [0, 1, 1], "router": {"kind": "softmax", "fine": "none"}},
}


def load(tmp_path, flags: str = "", file: dict | None = None, sections: dict | None = DENSE):
    """What a run makes of a file and flags when its directory ``hf`` has these sections."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"megatron_ds": file or {}}))

    def defaults_in(directory: Path):
        assert directory == Path("hf")
        return sections

    argv = ["--config", str(path), "--load", "hf", *DATA, *flags.split()]
    return load_config(argv, world_size=1, defaults_in=defaults_in)


def test_the_model_lies_between_generation_and_file(tmp_path):
    ours = load(tmp_path, file={"model": {"seq_length": 512, "hidden_dropout": 0.1}}).config.megatron_ds
    assert (ours.generation, ours.moe) == ("v1", None)
    assert (ours.model.num_layers, ours.model.hidden_size, ours.model.norm_epsilon) == (3, 96, 1e-5)
    assert (ours.model.seq_length, ours.model.hidden_dropout) == (512, 0.1)
    assert ours.model.attention.window == 9


def test_experts_bring_their_generation(tmp_path):
    ours = load(tmp_path, sections=EXPERTS).config.megatron_ds
    assert (ours.generation, ours.moe.num_experts, ours.moe.moe_layer_freq) == ("v2", 4, (0, 1, 1))
    assert ours.moe.router.fine == "none" and ours.model.rotary_interleaved is False
    assert load(tmp_path, "--generation v3", sections=EXPERTS).config.megatron_ds.moe.router.kind == "softmax"


def test_where_values_come_from_is_printed(tmp_path):
    lines = load(tmp_path, "--rotary-interleaved").changes
    assert "megatron_ds.model.num_layers: 3 (hf)" in lines
    assert "megatron_ds.model.rotary_interleaved: true (--rotary-interleaved)" in lines
    assert not any("seq_length" in line for line in lines)


def test_the_same_value_is_no_contradiction(tmp_path):
    resolved = load(tmp_path).config
    file = json.loads(resolved.model_dump_json())["megatron_ds"]
    assert load(tmp_path, file=file).config == resolved
    experts = load(tmp_path, sections=EXPERTS).config
    file = json.loads(experts.model_dump_json())["megatron_ds"]
    assert load(tmp_path, file=file, sections=EXPERTS).config == experts


def test_contradictions_are_told_together(tmp_path):
    file = {"model": {"hidden_size": 128, "attention": {"kind": "full"}}, "moe": {"num_experts": 8}}
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "--num-layers 5", file)
    assert str(caught.value).splitlines() == [
        f"4 problems in the configuration ({tmp_path / 'run.json'} and the command line)",
        "  1. megatron_ds.model.hidden_size = 128: the weights are of a model with 96 (hf); leave it out",
        '  2. megatron_ds.model.attention.kind = "full": the weights are of a model with "hybrid" (hf); leave it out',
        "  3. megatron_ds.model.num_layers (--num-layers) = 5: the weights are of a model with 3 (hf); leave it out",
        '  4. megatron_ds.moe = {"num_experts": 8}: the weights are of a model with no experts (hf); leave it out',
    ]
    with pytest.raises(ConfigError, match=r"moe = \{\}: the weights are of a model with no experts"):
        load(tmp_path, file={"generation": "v2", "moe": {}})
    with pytest.raises(ConfigError, match=r"megatron_ds\.moe = null: the weights are of a model with experts"):
        load(tmp_path, file={"moe": None}, sections=EXPERTS)


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        ("--rotary-interleaved", "rotary_interleaved", True),
        ("--rotary-base 1e6", "rotary_base", 1e6),
        ("--max-position-embeddings 8192", "max_position_embeddings", 8192),
        ("--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", True),
        ("--mtp-num-layers 1", "mtp_num_layers", 1),
    ],
)
def test_what_a_run_may_have_otherwise(tmp_path, flags, path, value):
    assert getattr(load(tmp_path, flags).config.megatron_ds.model, path) == value


def test_another_extension_of_the_context_replaces_the_models(tmp_path):
    scaling = load(tmp_path, "--rope-scaling-factor 3").config.megatron_ds.model.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 3.0)
    flags = "--rope-scaling yarn --rope-scaling-factor 4 --rope-scaling-original-max-position-embeddings 1024"
    scaling = load(tmp_path, flags).config.megatron_ds.model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.beta_fast) == ("yarn", 4.0, 32.0)
    file = {"model": {"rope_scaling": {"kind": "default"}}}
    assert load(tmp_path, file=file).config.megatron_ds.model.rope_scaling.kind == "default"


def test_a_router_may_gain_a_bias(tmp_path):
    assert load(tmp_path, "--router-fine bias", sections=EXPERTS).config.megatron_ds.moe.router.fine == "bias"


def test_directories_of_checkpoints_settle_nothing(tmp_path):
    ours = load(tmp_path, "--num-layers 5 --vocab-size 99", sections=None).config.megatron_ds
    assert (ours.model.num_layers, ours.model.hidden_size) == (5, 768)
