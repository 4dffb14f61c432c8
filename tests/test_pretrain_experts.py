"""A run with experts as users start it: resuming after a kill, other layouts, export, table and picture of the load."""

import json

import pytest
from runs import cli, launch, launch_and_kill, ledger, losses, make_corpus

pytestmark = pytest.mark.launch

CONFIG = ("--deepspeed_config", "experts.json")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """20 steps in one go on two expert-parallel ranks."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    return corpus, launch(corpus, "deepspeed", 2, *CONFIG, "--run-name", "straight")


def test_the_ledger_counts_every_assignment(straight):
    corpus, result = straight
    rows = ledger(corpus, "straight")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    for row in rows:
        assert row["moe/assignments"] == 8 * 64 * 2 * 2  # sequences, tokens, experts of a token, layers
        assert [sum(load) for load in row["experts"]["load"]] == [8 * 64 * 2] * 2
        assert row["moe/bytes_sent"] > 0 and 0 <= row["moe/exposed_s"] <= row["moe/exchange_s"]
        assert row["moe/aux_loss"] > 0
    assert rows[-1]["moe/bias_max"] > 0 > rows[-1]["moe/bias_min"]
    assert "(ep 2)" in result.stdout and "active)" in result.stdout


def test_the_table_and_the_picture(straight):
    corpus, _ = straight
    table = cli(corpus, "experts", "--run", "runs/straight").stdout
    assert "2,048" in table, table
    assert (corpus / "runs" / "straight" / "experts.png").stat().st_size > 10_000


def test_kill_and_the_same_command_equal_a_straight_run(straight):
    corpus, _ = straight
    launch_and_kill(corpus, "deepspeed", 2, "killed", 13, *CONFIG, "--run-name", "killed")
    result = launch(corpus, "deepspeed", 2, *CONFIG, "--run-name", "killed")
    assert "resumed at step 10" in result.stdout
    assert losses(corpus, "killed") == losses(corpus, "straight")
    loads = [[row["experts"]["load"] for row in ledger(corpus, run)] for run in ("killed", "straight")]
    assert loads[0] == loads[1]


def test_one_process_continues_what_two_ranks_began(straight):
    corpus, _ = straight
    one = (*CONFIG, "--run-name", "one", "--expert-model-parallel-size", "1", "--train-iters", "11")
    launch(corpus, "python", 1, *one, "--lr-decay-iters", "20", "--load", "runs/straight/checkpoints/global_step10")
    assert losses(corpus, "one")[0][1] == pytest.approx(losses(corpus, "straight")[10][1], rel=1e-6)


def test_the_export_equals_the_trained_model(straight):
    corpus, _ = straight
    load = ("--load", "runs/straight/checkpoints", "--output", "hf")
    result = cli(corpus, "export-hf", *load, "--verify")
    assert "ernie4_5_moe" in result.stdout
    assert json.loads((corpus / "hf" / "config.json").read_text())["moe_num_experts"] == 4
    refused = cli(corpus, "export-hf", *load, "--target", "mixtral", check=False)
    assert refused.returncode == 2 and "shared expert" in refused.stderr


def test_a_checkpoint_of_another_model_is_refused(straight):
    """Fewer experts, or fewer layers: parts of its tensors would fit."""
    corpus, _ = straight
    one = (*CONFIG, "--run-name", "other", "--expert-model-parallel-size", "1", "--load", "runs/straight/checkpoints")
    for change in (("--num-experts", "2"), ("--num-layers", "2", "--moe-layer-freq", "0", "1")):
        refused = launch(corpus, "python", 1, *one, *change, check=False)
        assert refused.returncode == 4, refused.stderr
        assert "does not hold the configured model" in refused.stderr
