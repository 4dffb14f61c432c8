"""The command line: every leaf has one flag, every form of a value is read, nothing is ambiguous."""

from typing import get_args, get_origin

import pytest

from megatron_ds.config.check import check
from megatron_ds.config.flags import FLAGS, KNOWN, LEAVES_AT, flag_name, read_command_line
from megatron_ds.config.help import help_text
from megatron_ds.config.megatron_flags import ALIASES, ALWAYS, IMPLIED, REFUSED_FLAGS, SHORTHANDS, VALUES
from megatron_ds.config.problems import Findings
from megatron_ds.config.schema import LrPhase
from megatron_ds.config.token_schedule import ScheduledBatch
from megatron_ds.config.tree import LEAF_PATHS, LEAVES, OURS, full_path, lookup, write
from megatron_ds.config.values import accepts, choices, members, unwrap

MODEL, MOE = (OURS, "model"), (OURS, "moe")
LAYOUT = (OURS, "parallel", "pipeline_model_parallel_layout")
TEXTS = {"^[LG]+$": "LG", unwrap(ScheduledBatch)[1]["pattern"]: "0:4", unwrap(LrPhase)[1]["pattern"]: "1K:constant"}
"""A text of each form."""


def read(text: str):
    """The values of a correct command line."""
    findings = Findings()
    line = read_command_line(text.split(), findings)
    assert findings.problems == []
    return line


def example(annotation) -> tuple[str, object]:
    """A text that a flag of this type takes, and the value that it stands for."""
    if choices(annotation):
        choice = choices(annotation)[0]
        return str(choice).lower() if isinstance(choice, bool) else str(choice), choice
    base, bounds = unwrap(members(annotation)[0])
    if base is bool:
        return "true", True
    if base in (int, float):
        number = base(bounds.get("gt", bounds.get("ge", 0))) + (2 if base is int else 0.5)
        return str(number), number
    if base is str:
        text = TEXTS.get(bounds.get("pattern"), "5")
        return text, text
    if get_origin(base) is dict:
        return "a=x", {"a": ["x"]}
    text, value = example(get_args(base)[0])
    count = 2 if get_args(base)[-1] is ... else len(get_args(base))
    return " ".join([text] * count), [value] * count


def test_no_flag_has_two_meanings():
    names = [flag_name(path) for path in LEAF_PATHS if path[0] == OURS]
    every = [*names, *ALIASES, *SHORTHANDS, *ALWAYS, *REFUSED_FLAGS]
    assert sorted(set(every)) == sorted(every)
    negations = {name.replace("--", "--no-", 1) for name, flag in FLAGS.items() if flag.is_switch}
    assert not negations & set(KNOWN)
    assert {name for name in KNOWN if "_" in name} == set()


def test_every_leaf_of_ours_has_a_flag():
    assert {flag.path for flag in FLAGS.values()} >= {path for path in LEAF_PATHS if path[0] == OURS}


def test_tables_name_existing_leaves():
    settings = [*SHORTHANDS.values(), *IMPLIED.values()]
    for path, value in settings:
        leaves = LEAVES_AT[full_path(tuple(path.split(".")))]
        assert all(accepts(leaf.annotation, value) for leaf in leaves)
    assert set(IMPLIED) | set(VALUES) <= set(ALIASES)
    for name, words in VALUES.items():
        assert all(accepts(FLAGS[name].annotation, ours) for ours in words.values())
    for flag in REFUSED_FLAGS.values():
        mentioned = [word.rstrip(",") for word in flag[1].split() if word.startswith("--")]
        assert set(mentioned) <= {*KNOWN, "--deepspeed_config"}


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_the_value_of_a_flag_reaches_its_leaf(name):
    flag = FLAGS[name]
    text, value = example(flag.annotation)
    line = read(f"{name} {text}")
    assert line.values[flag.path] == value
    assert line.flag_of[flag.path] == name
    assert accepts(flag.annotation, value)


def test_variants_that_share_a_leaf_agree_on_how_it_is_written():
    for leaves in LEAVES_AT.values():
        bases = {unwrap(members(leaf.annotation)[0])[0] for leaf in leaves}
        assert len(bases) == 1


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("--num-layers=4", (*MODEL, "num_layers"), 4),
        ("--num_layers 4", (*MODEL, "num_layers"), 4),
        ("--qk-layernorm", (*MODEL, "qk_layernorm"), True),
        ("--no-qk-layernorm", (*MODEL, "qk_layernorm"), False),
        ("--qk-layernorm false", (*MODEL, "qk_layernorm"), False),
        ("--eval-interval none", (OURS, "training", "eval_interval"), None),
        ("--lr auto", ("optimizer", "params", "lr"), "auto"),
        ("--lr 3e-4", ("optimizer", "params", "lr"), 3e-4),
        ("--loss-scale -1", ("fp16", "loss_scale"), -1.0),
        ("--data-path 0.3 a 0.7 b", (OURS, "data", "data_path"), ["0.3", "a", "0.7", "b"]),
        ("--data-path=a", (OURS, "data", "data_path"), ["a"]),
        (
            "--eval-data-path code=0.5 a 0.5 b text=c",
            (OURS, "data", "eval_data_path"),
            {"code": ["0.5", "a", "0.5", "b"], "text": ["c"]},
        ),
        ("--eval-data-path a=data/x=1", (OURS, "data", "eval_data_path"), {"a": ["data/x=1"]}),
        ("--run-name 7", (OURS, "monitor", "run_name"), "7"),
        ("--attention full", (*MODEL, "attention", "kind"), "full"),
        ("--attention-window-growth-start 8", (*MODEL, "attention", "window_growth", "start"), 8),
        ("--zero-stage 2", ("zero_optimization", "stage"), 2),
        ("--use-distributed-optimizer", ("zero_optimization", "stage"), 1),
        ("--set model.num_layers=4", (*MODEL, "num_layers"), 4),
        ("--set megatron_ds.model.num_layers=4", (*MODEL, "num_layers"), 4),
        ("--set zero_optimization.overlap_comm=true", ("zero_optimization", "overlap_comm"), True),
        ("--set data.split=1", (OURS, "data", "split"), "1"),
        ("--set model.attention.window_growth=null", (*MODEL, "attention", "window_growth"), None),
        ('--set model.attention={"kind":"full"}', (*MODEL, "attention"), {"kind": "full"}),
        ("--set data.data_path=x", (OURS, "data", "data_path"), "x"),
        ("--set generation=v1 data.eod_id=3", (OURS, "data", "eod_id"), 3),
        ("--set checkpoint.save=out=1", (OURS, "checkpoint", "save"), "out=1"),
        ("--wandb-project p", ("wandb", "enabled"), True),
        ("--wandb-project p --no-wandb", ("wandb", "enabled"), False),
        ("--num-experts 4", (*MOE, "num_experts"), 4),
        ("--router sigmoid", (*MOE, "router", "kind"), "sigmoid"),
        ("--moe-router-score-function sigmoid", (*MOE, "router", "kind"), "sigmoid"),
        ("--router-fine refine", (*MOE, "router", "fine"), "refine"),
        ("--moe-router-pre-softmax", (*MOE, "router", "norm_topk_prob"), False),
        ("--moe-token-dispatcher-type alltoall", (*MOE, "dispatcher"), "all_to_all"),
        ("--moe-token-dispatcher-type ring", (*MOE, "dispatcher"), "ring"),
        ("--moe-expert-capacity-factor 1.5", (*MOE, "capacity", "factor"), 1.5),
        ("--moe-expert-capacity-factor 1.5", (*MOE, "capacity", "kind"), "fixed"),
        ("--moe-expert-capacity-factor 1.5 --capacity dynamic", (*MOE, "capacity", "kind"), "dynamic"),
        ("--expert-model-parallel-size 4", (OURS, "parallel", "expert_model_parallel_size"), 4),
        ("--moe-layer-freq 2", (*MOE, "moe_layer_freq"), 2),
        ("--moe-layer-freq 0 1 1 1", (*MOE, "moe_layer_freq"), [0, 1, 1, 1]),
        ("--moe-layer-freq ([0]*1+[1]*3)", (*MOE, "moe_layer_freq"), [0, 1, 1, 1]),
        ("--set moe.moe_layer_freq=[0]+3*[1]", (*MOE, "moe_layer_freq"), [0, 1, 1, 1]),
        ("--set moe.moe_layer_freq=2", (*MOE, "moe_layer_freq"), 2),
        ("--multi-latent-attention", (*MODEL, "attention", "kind"), "latent"),
        ("--kv-lora-rank 16", (*MODEL, "attention", "kv_lora_rank"), 16),
        ("--rope-type rope", (*MODEL, "rope_scaling", "kind"), "default"),
        ("--rotary-scaling-factor 40", (*MODEL, "rope_scaling", "factor"), 40.0),
        (
            "--pipeline-model-parallel-layout 2 3 2 1",
            (OURS, "parallel", "pipeline_model_parallel_layout"),
            [2, 3, 2, 1],
        ),
        (
            "--pipeline-model-parallel-layout [2]*3+[1]",
            (OURS, "parallel", "pipeline_model_parallel_layout"),
            [2, 2, 2, 1],
        ),
        ("--pipeline-model-parallel-layout none", LAYOUT, None),
        ("--enable-zbh1-pipeline", (OURS, "parallel", "schedule", "kind"), "zb_h1"),
        ("--no-sequence-parallel", (OURS, "parallel", "sequence_parallel"), False),
        ("--moe-router-bias-update-rate 0", (*MOE, "moe_router_bias_update_rate"), 0.0),
        ("--rampup-batch-size 4 4 100", (OURS, "training", "rampup_batch_size"), [4, 4, 100]),
        ("--lr-phases 10T:constant", (OURS, "training", "lr_phases"), ["10T:constant"]),
        ("--dead-expert-steps 7", (OURS, "monitor", "dead_expert_steps"), 7),
    ],
)
def test_forms_of_a_value(text, path, value):
    found = read(text).values[path]
    assert found == value
    assert type(found) is type(value)


def test_what_launchers_add_is_swallowed():
    for text in ("--local_rank 3", "--local_rank=3", "--local-rank 3", "--local-rank=-1", "--deepspeed"):
        line = read(text)
        assert line.values == {}
        assert line.file is None
    for text in ("--deepspeed_config a.json", "--deepspeed-config a.json", "--config=a.json --config ./a.json"):
        assert read(text).file.endswith("a.json")


def test_facts_are_accepted_and_write_nothing():
    for name, (allowed, _) in ALWAYS.items():
        for value in allowed or ("",):
            assert read(f"{name} {value}").values == {}


def test_the_same_value_twice_is_no_contradiction():
    assert read("--num-layers 4 --set model.num_layers=4").values == {(*MODEL, "num_layers"): 4}


def test_the_order_of_flags_has_no_meaning():
    words = ["--attention-window 9", "--attention soft_gate", "--num-layers 4", "--adam-beta1 0.5", "--bf16"]
    forward, backward = read(" ".join(words)), read(" ".join(reversed(words)))
    assert forward.values == backward.values


def misspelt(name: str) -> str:
    """A name with its last two letters exchanged, or the last doubled where that changes nothing or too much."""
    swapped = name[:-2] + name[-1] + name[-2]
    return swapped if swapped != name and len(name) > 3 else name + name[-1]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_misspelt_flag_is_one_problem(name):
    findings = Findings()
    read_command_line([misspelt(name), "1"], findings)
    (problem,) = findings.problems
    assert problem.path == (misspelt(name),)
    assert "did you mean --" in problem.fix


def sample(annotation) -> object:
    return example(annotation)[1]


def valid_tree(leaf) -> dict:
    """A tree that has the leaf's section of the right kind, and what that kind requires."""
    tree: dict = {}
    for other in LEAVES:
        siblings = other.path[:-1] == leaf.path[:-1] and other.variant == leaf.variant
        if siblings and other.owner.model_fields.get(other.path[-1], None) is not None:
            field = other.owner.model_fields[other.path[-1]]
            if field.is_required():
                write(tree, other.path, sample(other.annotation))
    if leaf.variant:
        write(tree, (*leaf.path[:3], "kind"), leaf.variant)
    return tree


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join((*leaf.path, leaf.variant or "")))
def test_each_leaf_takes_its_type_and_no_other(leaf):
    tree = valid_tree(leaf)
    write(tree, leaf.path, sample(leaf.annotation))
    findings = Findings()
    config = check(tree, findings)
    assert findings.problems == []
    assert lookup(config.model_dump(mode="json"), leaf.path) == sample(leaf.annotation)
    write(tree, leaf.path, {"wrong": {}})
    findings = Findings()
    check(tree, findings)
    assert [problem.path for problem in findings.problems] == [leaf.path]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join((*leaf.path, leaf.variant or "")))
def test_each_misspelt_key_is_one_problem_with_a_hint(leaf):
    tree = valid_tree(leaf)
    *parents, name = leaf.path
    wrong = (*parents, misspelt(name))
    write(tree, wrong, sample(leaf.annotation))
    findings = Findings()
    check(tree, findings)
    (problem,) = findings.problems
    assert problem.path == wrong
    assert problem.fix.startswith("did you mean")


def test_help_names_every_flag_with_its_meaning():
    text = help_text("pretrain.py")
    for name, flag in FLAGS.items():
        assert f"--[no-]{name[2:]}" in text if flag.is_switch else name in text
        assert flag.leaves[0].doc or name == "--tensorboard-dir"
    assert "example:" in text
    assert max(map(len, text.splitlines())) <= 120
