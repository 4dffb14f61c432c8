"""All mistakes at once: ten in file and flags, and every kind of mistake alone, each found once and at its place."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ds.config.load import load_config
from megatron_ds.errors import ConfigError

LINE = re.compile(r"^ *(\d+)\. (?P<path>[^ ]+)(?P<flag> \([^)]*\))? = (?P<value>.+?): (?P<rule>.+); (?P<fix>.+)$")
GOOD = {"megatron_ds": {"data": {"data_path": ["data/corpus"], "tokenizer": "data/tokenizer"}}}
TEN = {
    "train_batch_size": 10,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "wall_clock_breakdown": True,
    "bf16": {"enabled": True},
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket": 1000},
    "megatron_ds": {
        "model": {"num_layer": 4, "hidden_size": "768", "attention": {"kind": "hybird"}},
        "training": {"lr_warmup_iters": 10, "lr_warmup_fraction": 0.1},
        "data": {"tokenizer": "data/tokenizer"},
    },
}
TEN_FLAGS = ["--seq-length", "long", "--adam-beta2", "0.99"]
TEN_PLACES = {
    "train_batch_size": "10",
    "wall_clock_breakdown": "true",
    "fp16.enabled": "true",
    "zero_optimization.reduce_bucket": "1000",
    "megatron_ds.model.num_layer": "4",
    "megatron_ds.model.hidden_size": '"768"',
    "megatron_ds.model.attention.kind": '"hybird"',
    "megatron_ds.model.seq_length": '"long"',
    "megatron_ds.training.lr_warmup_fraction": "0.1",
    "megatron_ds.data.data_path": "not set",
}
SCRIPT = """
import sys
from megatron_ds.config.load import load_config
from megatron_ds.errors import run_main

def main(argv):
    loaded = load_config(argv, prog="pretrain.py")
    print(len(loaded.changes), "changes")

run_main(main)
"""


def problems(argv: list[str], world_size: int = 1) -> list[re.Match]:
    """The numbered lines of the report, each taken apart; their count must be the one that the heading gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv, world_size=world_size)
    heading, *lines = str(caught.value).splitlines()
    matches = [LINE.match(line) for line in lines]
    assert all(matches), lines
    assert all(line.count("; ") == 1 for line in lines), "rule and fix are told apart by the semicolon"
    assert int(heading.split()[0]) == len(matches)
    assert [int(match[1]) for match in matches] == list(range(1, len(matches) + 1))
    return matches


def write(folder: Path, tree: object) -> str:
    file = folder / "run.json"
    file.write_text(json.dumps(tree))
    return str(file)


def test_ten_mistakes_are_ten_problems(tmp_path):
    found = problems(["--deepspeed_config", write(tmp_path, TEN), *TEN_FLAGS])
    assert {match["path"]: match["value"] for match in found} == TEN_PLACES
    assert len(found) == 10
    assert all(match["rule"] and match["fix"] for match in found)


def test_a_script_ends_with_code_2_and_the_same_ten(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "--deepspeed", "--deepspeed_config", write(tmp_path, TEN), *TEN_FLAGS]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)}, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    heading, *lines = done.stderr.splitlines()
    assert heading.startswith("error: 10 problems in the configuration")
    assert {LINE.match(line)["path"] for line in lines} == set(TEN_PLACES)
    assert "Traceback" not in done.stderr


def overlay(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = overlay(below[key], value) if both else value
    return merged


def ours(**sections: dict) -> dict:
    return {"megatron_ds": sections}


# What the file says besides GOOD, the flags, and where the one problem is and what its fix must contain.
SINGLE = [
    (ours(model={"num_layer": 4}), "", "megatron_ds.model.num_layer", "did you mean num_layers?"),
    (ours(modle={}), "", "megatron_ds.modle", "did you mean model?"),
    ({"megatron": {}}, "", "megatron", "did you mean megatron_ds?"),
    ({"train_batchsize": 4}, "", "train_batchsize", "did you mean train_batch_size?"),
    ({"micro_batch_size": 4}, "", "micro_batch_size", "train_micro_batch_size_per_gpu"),
    ({"model": {"num_layers": 4}}, "", "model", "megatron_ds.model"),
    (ours(model={"train_iters": 4}), "", "megatron_ds.model.train_iters", "megatron_ds.training.train_iters"),
    (ours(training={"lr": 1e-3}), "", "megatron_ds.training.lr", "optimizer.params.lr"),
    (ours(model={"hidden_size": "768"}), "", "megatron_ds.model.hidden_size", "768, without quotes"),
    (ours(model={"hidden_size": 768.0}), "", "megatron_ds.model.hidden_size", "768, as an integer"),
    (ours(model={"hidden_size": True}), "", "megatron_ds.model.hidden_size", "the default is 768"),
    (ours(model={"hidden_size": None}), "", "megatron_ds.model.hidden_size", "the default is 768"),
    (ours(model={"qk_layernorm": 1}), "", "megatron_ds.model.qk_layernorm", "the default is true"),
    (ours(data={"data_path": "data/corpus"}), "", "megatron_ds.data.data_path", '["data/corpus"], as a list'),
    (ours(data={"data_path": [1, "a"]}), "", "megatron_ds.data.data_path", '["1", "a"], with every item in quotes'),
    (ours(data={"eval_data_path": {"a": "x"}}), "", "megatron_ds.data.eval_data_path", "the default is {}"),
    (ours(monitor={"run_name": 7}), "", "megatron_ds.monitor.run_name", '"7", in quotes'),
    (ours(monitor={"run_name": "../up"}), "", "megatron_ds.monitor.run_name", "the default is null"),
    (ours(model={"num_layers": 0}), "", "megatron_ds.model.num_layers", "the default is 12"),
    (ours(model={"hidden_dropout": 1.0}), "", "megatron_ds.model.hidden_dropout", "the default is 0.0"),
    (ours(model={"attention": {"kind": "gate"}}), "", "megatron_ds.model.attention.kind", "soft_gate"),
    (ours(model={"attention": "full"}), "", "megatron_ds.model.attention", '{"kind": "full"}'),
    (ours(model={"attention": {"pattern": "LXG"}}), "", "megatron_ds.model.attention.pattern", "LLLG"),
    (ours(model={"attention": {"initial_gate": 0.5}}), "", "megatron_ds.model.attention.initial_gate", "soft_gate"),
    (ours(model={"rope_scaling": {"factor": 2.0}}), "", "megatron_ds.model.rope_scaling.factor", '"yarn"'),
    (ours(model={"rope_scaling": {"kind": "linear"}}), "", "megatron_ds.model.rope_scaling.factor", "a number >= 1"),
    (ours(training={"lr_decay_style": "cosin"}), "", "megatron_ds.training.lr_decay_style", 'did you mean "cosine"?'),
    (ours(generation="v9"), "", "megatron_ds.generation", 'the default is "v1"'),
    ({"megatron_ds": []}, "", "megatron_ds", "write it like"),
    ({"zero_optimization": {"stage": 4}}, "", "zero_optimization.stage", "the default is 1"),
    ({"zero_optimization": {"stage": True}}, "", "zero_optimization.stage", "the default is 1"),
    ({"zero_optimization": {"overlap_com": True}}, "", "zero_optimization.overlap_com", "did you mean overlap_comm?"),
    ({"zero_optimization": {"overlap_comm": "yes"}}, "", "zero_optimization.overlap_comm", "true or false"),
    (
        {"zero_optimization": {"zero_quantized_gradients": True}},
        "",
        "zero_optimization.zero_quantized_gradients",
        "out",
    ),
    ({"optimizer": {"type": "Adam"}}, "", "optimizer.type", 'did you mean "AdamW"?'),
    ({"optimizer": {"params": {"betas": [0.9]}}}, "", "optimizer.params.betas", "the default is [0.9, 0.95]"),
    ({"gradient_clipping": float("inf")}, "", "gradient_clipping", "the default is 1.0"),
    ({"gradient_clipping": float("nan")}, "", "gradient_clipping", "the default is 1.0"),
    ({"scheduler": {"type": "WarmupLR"}}, "", "scheduler", "lr_decay_style"),
    ({"comet": {"api_key": "secret"}}, "", "comet.api_key", "COMET_API_KEY"),
    ({"tensorboard": {"output": "x"}}, "", "tensorboard.output", "did you mean output_path?"),
    ({}, "--num-layer 4", "--num-layer", "did you mean --num-layers?"),
    ({}, "--no-qk-layernrm", "--no-qk-layernrm", "did you mean --no-qk-layernorm?"),
    ({}, "--num-layers", "--num-layers", "write --num-layers N"),
    ({}, "--num-layers four", "megatron_ds.model.num_layers", "the default is 12"),
    ({}, "--num-layers 4 5", "--num-layers", 'remove "5"'),
    ({}, "--train-iters 5 --train-iters 6", "--train-iters", "give it once"),
    ({}, "--bf16 maybe", "bf16.enabled", "the default is false"),
    ({}, "--no-bf16 yes", "--no-bf16", "leave the value out"),
    ({}, "--attention full --attention-window 4", "megatron_ds.model.attention.window", '"hybrid" or "soft_gate"'),
    ({}, "--eval-data-path data/x", "--eval-data-path", "write name=data/x"),
    ({}, "--batch-size 4", "--batch-size", "--micro-batch-size"),
    ({}, "--checkpoint-activations", "--checkpoint-activations", "--recompute-granularity full"),
    (
        {},
        "--position-embedding-type learned_absolute",
        "--position-embedding-type",
        "write --position-embedding-type rope",
    ),
    ({}, "--swiglu 1", "--swiglu", "leave the value out"),
    ({}, "--set model.num_layers", "--set", "model.num_layers=VALUE"),
    ({}, "--set model.depth=4", "megatron_ds.model.depth", "lists every key"),
    ({}, "--set model.num_layers=4.5", "megatron_ds.model.num_layers", "4, as an integer"),
    ({}, "--set optimizer.params.betas.2=0.5", "optimizer.params.betas.2", "lists every key"),
    ({}, "--deepspeed run.json", "--deepspeed", "did you mean --deepspeed_config run.json?"),
    ({}, "--config other.json", "--config", "give one file"),
    (ours(moe={}), "", "megatron_ds.moe", 'set generation to "v2"'),
    ({}, "--num-experts 8 --moe-router-topk 3", "megatron_ds.moe", 'set generation to "v2"'),
    ({}, "--expert-model-parallel-size 1 --router-fine bais", "megatron_ds.moe.router.fine", '"bias"'),
    (ours(generation="v2", moe=None), "", "megatron_ds.moe", "leave moe out"),
    (ours(generation="v2", moe={"topk": 3}), "", "megatron_ds.moe.topk", "moe.moe_router_topk"),
    (ours(generation="v2", moe={"router": {"groups": 3}}), "", "megatron_ds.moe.router.groups", "num_groups?"),
    (ours(generation="v2", moe={"router": "sigmoid"}), "", "megatron_ds.moe.router", '{"kind": "sigmoid"}'),
    (ours(generation="v2", moe={"capacity": {"factor": 2.0}}), "", "megatron_ds.moe.capacity.factor", '"dynamic"'),
    (ours(generation="v2", moe={"moe_layer_freq": [0, 2]}), "", "megatron_ds.moe.moe_layer_freq", "the default is 1"),
    (
        ours(generation="v2", moe={"moe_layer_freq": "[0]*1+[1]*3"}),
        "",
        "megatron_ds.moe.moe_layer_freq",
        "write [0, 1, 1, 1], without quotes",
    ),
    ({}, "--generation v2 --moe-layer-freq 0", "megatron_ds.moe.moe_layer_freq", "the default is 1"),
    ({}, "--generation v2 --moe-layer-freq 0 1 x", "megatron_ds.moe.moe_layer_freq", "the default is 1"),
    ({}, "--generation v2 --moe-layer-freq [1]*9**9", "megatron_ds.moe.moe_layer_freq", "the default is 1"),
    ({}, "--moe-token-dispatcher-type allgather", "megatron_ds.moe.dispatcher", "the default is"),
    ({}, "--moe-router-load-balancing-type aux_loss", "--moe-router-load-balancing-type", "--moe-aux-loss-coeff"),
    ({}, "--expert-interval 2", "--expert-interval", "--moe-layer-freq"),
    ({}, "--generation v2 --moe-token-drop-policy probs", "megatron_ds.moe.capacity.drop_policy", '"fixed"'),
]


@pytest.mark.parametrize(("more", "flags", "place", "fix"), SINGLE, ids=[f"{case[2]}:{case[1]}" for case in SINGLE])
def test_a_mistake_alone_is_one_problem_at_its_place(tmp_path, more, flags, place, fix):
    (found,) = problems(["--deepspeed_config", write(tmp_path, overlay(GOOD, more)), *flags.split()])
    assert found["path"] == place
    assert fix in found["fix"]


def test_without_the_mistake_there_is_no_problem(tmp_path):
    assert load_config(["--deepspeed_config", write(tmp_path, GOOD)], world_size=1).config


def test_a_word_without_a_flag(tmp_path):
    with pytest.raises(ConfigError, match=r'command line = "corpus": belongs to no flag'):
        load_config(["corpus", "--deepspeed_config", write(tmp_path, GOOD)])


@pytest.mark.parametrize(
    "tree",
    [
        {"wall_clock_breakdown": False},
        {"flops_profiler": {"enabled": False}},
        {"zero_optimization": {"zero_quantized_weights": False}},
    ],
)
def test_a_refused_key_may_say_that_it_is_off(tmp_path, tree):
    loaded = load_config(["--config", write(tmp_path, overlay(GOOD, tree))], world_size=1)
    assert any("-> not used" in change for change in loaded.changes)


def test_one_wrong_value_does_not_raise_others(tmp_path):
    """hidden_size, its heads and the window are read by rules; a wrong one silences them instead of multiplying."""
    tree = overlay(GOOD, ours(model={"hidden_size": -1, "num_attention_heads": 7, "num_query_groups": 5}))
    places = [match["path"] for match in problems(["--config", write(tmp_path, tree)])]
    assert places == ["megatron_ds.model.hidden_size", "megatron_ds.model.num_query_groups"]


def test_a_misspelt_required_key_is_not_also_missing(tmp_path):
    tree = ours(data={"data_pth": ["a"], "tokeniser": "t"})
    places = [match["path"] for match in problems(["--config", write(tmp_path, tree)])]
    assert places == ["megatron_ds.data.data_pth", "megatron_ds.data.tokeniser"]
