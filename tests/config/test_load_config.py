"""Sources and their precedence, the batch triangle over file and flags, what is printed, and what loads again."""

import json
from pathlib import Path

import pytest

from megatron_ds.config import load
from megatron_ds.config.load import load_config
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.resolve import config_difference
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.config.tree import flatten
from megatron_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
DATA = ["--data-path", "data/corpus", "--tokenizer", "data/tokenizer"]


def loaded(tmp_path, tree=None, flags="", world_size=1, name="run.json"):
    file = tmp_path / name
    file.write_text(json.dumps(tree or {}))
    return load_config(["--config", str(file), *DATA, *flags.split()], world_size=world_size)


def ours(**sections):
    return {"megatron_ds": sections}


def test_later_sources_win(tmp_path, monkeypatch):
    monkeypatch.setitem(load.GENERATION_DEFAULTS, "v1", ours(model={"num_layers": 3, "hidden_size": 96}))
    model = loaded(tmp_path).config.megatron_ds.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (3, 96, 12)
    file = ours(generation="v1", model={"num_layers": 5})
    assert loaded(tmp_path, file).config.megatron_ds.model.num_layers == 5
    assert loaded(tmp_path, file, "--num-layers 7").config.megatron_ds.model.num_layers == 7
    assert loaded(tmp_path, file).config.megatron_ds.model.hidden_size == 96


def test_defaults_are_those_of_the_issue(tmp_path):
    config = load_config(DATA, world_size=1).config
    ours_ = config.megatron_ds
    assert ours_.model.seq_length == 2048
    assert config.optimizer.params.weight_decay == 0.01
    assert ours_.checkpoint.save_interval == 1000
    assert config.optimizer.params.lr == 5e-4 * 1 / 256


def test_the_world_is_the_launchers(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert load_config(DATA).config.train_batch_size == 6
    monkeypatch.delenv("WORLD_SIZE")
    assert load_config(DATA).config.train_batch_size == 1


def test_generation_v2_has_its_own_defaults(tmp_path):
    v1, v2 = (loaded(tmp_path, ours(generation=name)).config.megatron_ds for name in ("v1", "v2"))
    assert v1.moe is None and v2.moe == MoEConfig()
    assert (v2.model.attention.kind, v2.model.rotary_interleaved, v2.model.qk_layernorm) == ("full", True, False)
    file = ours(generation="v2", model={"attention": {"kind": "hybrid", "window": 8}}, moe={"router": {"fine": "none"}})
    given = loaded(tmp_path, file, "--num-experts 4 --router-scaling-factor 2.5").config.megatron_ds
    assert (given.model.attention.kind, given.model.attention.window) == ("hybrid", 8)
    assert (given.moe.num_experts, given.moe.router.fine, given.moe.router.scaling_factor) == (4, "none", 2.5)
    assert loaded(tmp_path, flags="--generation v2").config.megatron_ds == v2


def test_a_flag_may_open_a_section_that_the_file_closes(tmp_path):
    file = ours(generation="v2", moe=None)
    assert loaded(tmp_path, file, "--num-experts 4").config.megatron_ds.moe == MoEConfig(num_experts=4)


M, T, A = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("file", "flags", "ranks", "expected"),
    [
        ({}, "", 3, (3, 1, 1)),
        ({M: 4}, "", 3, (12, 4, 1)),
        ({A: 5}, "", 3, (15, 1, 5)),
        ({T: 12}, "", 3, (12, 4, 1)),
        ({T: 24, M: 4}, "", 3, (24, 4, 2)),
        ({T: 24, A: 4}, "", 3, (24, 2, 4)),
        ({M: 4, A: 2}, "", 3, (24, 4, 2)),
        ({T: 24, M: 4, A: 2}, "", 3, (24, 4, 2)),
        ({T: "auto", M: "auto", A: "auto"}, "", 2, (2, 1, 1)),
        # A flag against all three: the file's accumulation gives way first, then its global batch.
        ({T: 24, M: 4, A: 2}, "--global-batch-size 48", 3, (48, 4, 4)),
        ({M: 4, A: 2}, "--global-batch-size 48", 3, (48, 4, 4)),
        ({T: 24, M: 4, A: 2}, "--micro-batch-size 8", 3, (24, 8, 1)),
        ({T: 24, M: 4, A: 2}, "--gradient-accumulation-steps 3", 3, (36, 4, 3)),
        ({T: 24, M: 4}, "--gradient-accumulation-steps 3", 3, (36, 4, 3)),
        ({T: 24, M: 4, A: 2}, "--micro-batch-size 2 --gradient-accumulation-steps 3", 3, (18, 2, 3)),
        ({T: 24, M: 4, A: 2}, "--global-batch-size 18 --gradient-accumulation-steps 3", 3, (18, 2, 3)),
        ({T: 24, M: 4, A: 2}, "--set train_batch_size=48", 3, (48, 4, 4)),
        # Pipeline stages take ranks from the data axis.
        ({M: 4, A: 2}, "--pipeline-model-parallel-size 2", 4, (16, 4, 2)),
    ],
)
def test_the_batch_triangle(tmp_path, file, flags, ranks, expected):
    config = loaded(tmp_path, file, flags, ranks).config
    assert (
        config.train_batch_size,
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    ) == expected


def test_three_flags_that_disagree_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"train_batch_size \(--global-batch-size\) = 7: must be"):
        loaded(tmp_path, {}, "--global-batch-size 7 --micro-batch-size 2 --gradient-accumulation-steps 3")


def test_automatic_values_of_other_trainers_files(tmp_path):
    file = {
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": "auto"},
        "wandb": {"project": "auto"},
    }
    result = loaded(tmp_path, file, "--global-batch-size 128")
    assert result.config.optimizer.params.lr == 2.5e-4
    assert result.config.optimizer.params.betas == (0.9, 0.95)
    assert result.config.wandb.project == "auto"
    assert 'optimizer.params.lr: "auto" -> 0.00025 (5e-4 x global batch 128 / 256)' in result.changes
    assert 'gradient_clipping: "auto" -> 1.0' in result.changes
    with pytest.raises(ConfigError, match=r"train_bath_size.*did you mean train_batch_size"):
        loaded(tmp_path, {"train_bath_size": "auto"})


def test_a_flag_for_another_kind_replaces_the_section(tmp_path):
    file = ours(model={"attention": {"kind": "hybrid", "pattern": "LG", "window": 32}})
    result = loaded(tmp_path, file, "--attention soft_gate --attention-initial-gate 0.5")
    attention = result.config.megatron_ds.model.attention
    assert attention.model_dump() == {"kind": "soft_gate", "window": 128, "implementation": "lse", "initial_gate": 0.5}
    assert 'megatron_ds.model.attention.pattern: "LG" -> not used' in result.changes
    kept = loaded(tmp_path, file, "--attention hybrid --attention-window 8").config.megatron_ds.model.attention
    assert (kept.pattern, kept.window) == ("LG", 8)


def test_one_beta_keeps_the_other(tmp_path):
    file = {"optimizer": {"params": {"betas": [0.8, 0.9]}}}
    assert loaded(tmp_path, file, "--adam-beta2 0.99").config.optimizer.params.betas == (0.8, 0.99)
    assert loaded(tmp_path, {}, "--adam-beta1 0.5").config.optimizer.params.betas == (0.5, 0.95)


def test_changes_tell_what_differs_from_the_file(tmp_path):
    file = {M: 4, "optimizer": {"params": {"lr": 1e-3}}, **ours(model={"num_layers": 8, "hidden_size": 96})}
    result = loaded(tmp_path, file, "--num-layers 6 --seed 7", world_size=2)
    assert result.file == tmp_path / "run.json"
    *lines, last = result.changes
    assert lines == [
        "train_batch_size: 8 (8 = micro batch 4 x accumulation 1 x 2 data-parallel ranks)",
        "gradient_accumulation_steps: 1 (8 = micro batch 4 x accumulation 1 x 2 data-parallel ranks)",
        "megatron_ds.model.num_layers: 8 -> 6 (--num-layers)",
        'megatron_ds.data.data_path: ["data/corpus"] (--data-path)',
        'megatron_ds.data.tokenizer: "data/tokenizer" (--tokenizer)',
        "megatron_ds.training.seed: 7 (--seed)",
        'megatron_ds.monitor.run_name: "run" (the file\'s name)',
    ]
    total = len(flatten(result.config.model_dump(mode="json")))
    in_file_unchanged = 3
    assert last == f"{total - len(lines) - in_file_unchanged} settings have their default"


def test_the_run_is_named_after_the_file(tmp_path):
    assert loaded(tmp_path, name="my_run.json").config.megatron_ds.monitor.run_name == "my_run"
    assert loaded(tmp_path, flags="--run-name other").config.megatron_ds.monitor.run_name == "other"
    without = load_config(DATA, world_size=1)
    assert without.config.megatron_ds.monitor.run_name == "run"
    assert without.file is None


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--rope-scaling yarn --rope-scaling-factor 2 --rope-scaling-original-max-position-embeddings 1024 --fp16",
        "--attention-window-growth-start 4 --attention-window-growth-iters 9 --eval-data-path a=x b=0.5 y 0.5 z",
        "--set zero_optimization.overlap_comm=true tensorboard.job_name=x --tensorboard-dir logs --zero-stage 3",
        "--lr 0.1 --adam-eps 1e-9 --recompute-granularity full --exit-duration-in-mins 0.1 --bf16",
        '--set zero_optimization.offload_optimizer={"device":"cpu"} comms_logger.prof_ops=["all_reduce"]',
        "--generation v2 --expert-model-parallel-size 5 --num-experts 10 --num-layers 2 --moe-layer-freq 0 1",
        "--generation v2 --router sigmoid --router-fine refine --capacity dynamic --capacity-min-share 0.5 --fp16",
    ],
)
def test_a_resolved_configuration_loads_again_to_itself(tmp_path, flags):
    first = loaded(tmp_path, {M: 3}, flags, world_size=5).config
    file = tmp_path / "resolved.json"
    file.write_text(first.model_dump_json())
    again = load_config(["--config", str(file)], world_size=5)
    assert again.config == first
    assert config_difference(first, again.config) == []
    assert again.changes == ["0 settings have their default"]


def test_a_length_given_by_a_flag_replaces_that_of_the_file(tmp_path):
    in_steps = {"train_micro_batch_size_per_gpu": 4, **ours(training={"train_iters": 50})}
    found = loaded(tmp_path, in_steps, "--train-samples 83")
    assert found.config.megatron_ds.training.train_iters == 20
    assert "megatron_ds.training.train_iters: 50 -> 20 (the steps within 83 sequences)" in "\n".join(found.changes)
    in_samples = {"train_micro_batch_size_per_gpu": 4, **ours(training={"train_samples": 83})}
    training = loaded(tmp_path, in_samples, "--train-iters 50").config.megatron_ds.training
    assert (training.train_iters, training.train_samples) == (50, None)
    with pytest.raises(ConfigError, match="train_samples 83 is given too, which is 20 steps"):
        loaded(tmp_path, in_samples, "--train-iters 50 --train-samples 83")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_file_loads(file, tmp_path):
    settings = json.loads(file.read_text())["megatron_ds"]
    parallel = ParallelConfig(**settings["parallel"])
    stages, experts = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    least = parallel.tensor_model_parallel_size * stages * experts
    unit = 4 * experts * stages
    batch = ["--global-batch-size", str(unit * -(-1024 // unit)), "--micro-batch-size", "1"]
    # A batch that grows begins with one that not so many ranks can share, and ends where the file says.
    grows = "rampup_batch_size" in settings["training"]
    for world_size, flags in [(least, [])] if grows else [(least, batch), (4 * least, batch)]:
        config = load_config(["--deepspeed_config", str(file), *flags], world_size=world_size).config
        saved = tmp_path / "saved.json"
        saved.write_text(config.model_dump_json())
        assert load_config(["--config", str(saved)], world_size=world_size).config == config


def test_the_v2_example_is_the_same_training_in_every_layout():
    file = ["--config", str(ROOT / "ds_configs/v2_tiny.json")]
    for ranks in (1, 2, 4):
        config = load_config([*file, "--expert-model-parallel-size", str(ranks)], world_size=ranks).config
        assert (config.train_batch_size, config.gradient_accumulation_steps) == (8, 4 // ranks)


def test_the_v1_preset_has_the_sizes_of_its_name():
    config = load_config(["--config", str(ROOT / "ds_configs/v1.json")], world_size=8).config
    model = config.megatron_ds.model
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_kv_heads)
    layer = attention + 3 * model.hidden_size * model.ffn_size + 2 * model.hidden_size + 2 * model.head_dim
    total = model.num_layers * layer + model.padded_vocab_size * model.hidden_size + model.hidden_size
    assert total == 121_229_568
    assert model.seq_length == 2048
    assert config.optimizer.params.lr == 5e-4
    assert config.dtype_name == "bf16"
    assert config.wandb.enabled


def test_help_is_printed_and_ends_the_program(capsys):
    with pytest.raises(SystemExit) as done:
        load_config(["--help", "--nonsense"], prog="folder/pretrain.py")
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("usage: pretrain.py")
