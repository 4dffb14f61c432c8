"""``megatron-ds plan``: what it prints of a small run, the peak of a table by hand, and what does not fit."""

import json

import pytest

from megatron_ds.cli.main import main
from megatron_ds.cli.plan import describe_entries, peak_activations
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.errors import ConfigError
from megatron_ds.model.memory import Activations
from megatron_ds.pipeline.schedule import Compute

MODEL = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32,
    "vocab_size": 128, "mtp_num_layers": 1,
    "attention": {"kind": "latent", "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
}  # fmt: skip


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs the command on a configuration of 8 ranks; returns its code and lines."""

    def run(*flags, world_size=8, **parallel):
        axes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
        ours = {
            "generation": "v3", "model": MODEL, "parallel": axes | parallel,
            "moe": {"num_experts": 4, "moe_layer_freq": [0, 1, 1, 1], "moe_ffn_hidden_size": 32},
            "data": {"data_path": ["corpus"], "eod_id": 0},
        }  # fmt: skip
        file = tmp_path / "run.json"
        tree = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
        file.write_text(json.dumps(tree | {"megatron_ds": ours}))
        code = main(["plan", "--deepspeed_config", str(file), "--world-size", str(world_size), *flags])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_ranks_and_their_shares(plan):
    code, lines = plan()
    assert code == 0
    assert "pp 2 x dp 2 (ep 2) x tp 2 = 8 ranks, fp32, ZeRO-1, schedule 1f1b, chunks per rank 1" in lines[1]
    assert lines[2] == "batch 16 = micro batch 1 x 8 micro-batches x 2 data ranks, 32 tokens each"
    assert lines[3:7] == [
        "rank 0 shares the tensor axis with 0, 1",
        "rank 0 shares the expert axis with 0, 2",
        "rank 0 shares the data axis with 0, 2",
        "rank 0 shares the pipe axis with 0, 4",
    ]
    rows = [line.split() for line in lines if line.strip()[:2] in ("0 ", "1 ")]
    assert [row[0] for row in rows] == ["0", "1"] and "embedding," in rows[0]
    assert rows[1][2:5] == ["norm,", "mtp,", "output"]
    assert "pipeline rank" in lines[-1]


def test_a_run_that_does_not_fit_is_an_error(plan):
    code, lines = plan("--memory", "0.0001")
    assert code == 1 and lines[-1].startswith("does not fit")


def test_flags_of_the_run_come_after_two_dashes(plan):
    _, lines = plan("--", "--tensor-model-parallel-size", "1", "--seq-length", "64")
    assert "pp 2 x dp 4 (ep 2) x tp 1" in lines[1] and "64 tokens" in lines[2]


def test_a_topology_that_does_not_fit_the_world_names_one_that_does(plan):
    with pytest.raises(ConfigError, match=r"one copy of the model takes 4 ranks.*launch 4 or 8 ranks; the nearest"):
        plan(world_size=6)


def test_a_world_has_ranks(plan):
    with pytest.raises(ConfigError, match="--world-size 0: must be 1 or more"):
        plan(world_size=0)


@pytest.mark.parametrize(
    ("entries", "depths", "words"),
    [
        (range(0, 3), 1, "embedding, 0-1"),
        (range(3, 4), 1, "2"),
        (range(4, 9), 1, "3, norm, mtp, output"),
        (range(5, 9), 1, "norm, mtp, output"),
        (range(4, 7), 0, "3, norm, output"),
        (range(0, 7), 0, "embedding, 0-3, norm, output"),
        (range(0, 1), 0, "embedding"),
        (range(3, 3), 0, "nothing"),
    ],
)
def test_entries_in_words(entries, depths, words):
    assert describe_entries(entries, ModelConfig(num_layers=4, mtp_num_layers=depths)) == words


def test_the_peak_of_a_table_by_hand():
    forward, backward = Compute("forward", 0), Compute("backward", 0)
    first, second = Compute("backward_input", 0), Compute("backward_weight", 0)
    chunk = Activations(kept=10, deferred=4, working=7)
    assert peak_activations([forward, backward], [chunk]) == 17
    assert peak_activations([forward, forward, backward, backward], [chunk]) == 27
    assert peak_activations([forward, first, forward, first, second, second], [chunk]) == 4 + 10 + 7
    other = [Compute("forward", 0, 1), Compute("backward", 0, 1)]
    assert peak_activations([forward, *other, backward], [chunk, Activations(kept=100)]) == 110
