"""``pretrain.py`` as users start it: three launchers, resuming after a kill, the ways to stop, the run directory."""

import json

import pytest
from runs import launch, launch_and_kill, ledger, losses, make_corpus

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus):
    """20 steps in one go, two pipeline stages under the deepspeed launcher."""
    result = launch(corpus, "deepspeed", 2, "--run-name", "straight", "--pipeline-model-parallel-size", "2")
    return corpus, result


def test_a_run_leaves_ledger_status_config_and_checkpoints(straight):
    corpus, result = straight
    run = corpus / "runs" / "straight"
    rows = ledger(corpus, "straight")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    evaluations = ledger(corpus, "straight", "eval")
    assert [row["step"] for row in evaluations] == [0, 10, 20]
    assert evaluations[-1]["eval/bits_per_byte"] < evaluations[0]["eval/bits_per_byte"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "config.json").read_text())["megatron_ds"]["model"]["vocab_size"] == 512
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "global_step10", "global_step20", "latest", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip
    assert " iteration       20/      20 |" in result.stdout and "validation loss at iteration 20" in result.stdout
    assert list((run / "wandb").glob("offline-run-*")) == [], "wandb is off in this configuration"


@pytest.mark.parametrize("at", [10, 13])
def test_kill_and_the_same_command_equal_a_straight_run(straight, at):
    corpus, _ = straight
    name = f"killed{at}"
    arguments = ("--run-name", name, "--pipeline-model-parallel-size", "2")
    launch_and_kill(corpus, "deepspeed", 2, name, at, *arguments)
    result = launch(corpus, "deepspeed", 2, *arguments)
    assert losses(corpus, name) == losses(corpus, "straight")
    assert "resumed at step 10" in result.stdout
    assert all(row.get("health/replay_ok", True) for row in ledger(corpus, name))


def test_launchers_agree(straight):
    corpus, _ = straight
    launch(corpus, "torchrun", 2, "--run-name", "torchrun", "--pipeline-model-parallel-size", "2")
    launch(corpus, "python", 1, "--run-name", "python")
    assert losses(corpus, "torchrun") == losses(corpus, "straight")
    assert losses(corpus, "python") == losses(corpus, "straight"), "one process equals two stages, bit by bit"


def test_a_finished_run_does_nothing_but_says_so(straight):
    corpus, _ = straight
    before = losses(corpus, "straight")
    result = launch(corpus, "python", 1, "--run-name", "straight")
    assert losses(corpus, "straight") == before
    assert "nothing left to train" in result.stdout


def test_exit_interval_stops_and_the_next_start_goes_on(straight):
    corpus, _ = straight
    launch(corpus, "python", 1, "--run-name", "parts", "--exit-interval", "7")
    status = json.loads((corpus / "runs" / "parts" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 7)
    launch(corpus, "python", 1, "--run-name", "parts")
    assert losses(corpus, "parts") == losses(corpus, "straight")


def test_exit_duration_and_skip_train(corpus):
    launch(corpus, "python", 1, "--run-name", "short", "--exit-duration-in-mins", "0.001", "--train-iters", "5000")
    assert 1 <= len(ledger(corpus, "short")) < 5000
    result = launch(corpus, "python", 1, "--run-name", "short", "--skip-train", "--train-iters", "5000")
    assert "validation loss at iteration" in result.stdout


def test_named_evaluation_sets_are_weighted_by_tokens(corpus):
    sets = ("--eval-data-path", "few=few", "again=few", "--eval-iters", "none", "--train-iters", "1")
    launch(corpus, "python", 1, "--run-name", "sets", *sets, "--lr-warmup-iters", "0")
    row = ledger(corpus, "sets", "eval")[-1]
    assert row["eval/few/loss"] == row["eval/again/loss"] == pytest.approx(row["eval/loss"], rel=1e-12)
    tokens = json.loads((corpus / "few.meta.json").read_text())["tokens"]
    assert row["eval/few/tokens"] == tokens - 1, (
        "every target of the set counts once, its incomplete last sample included"
    )


def test_weights_and_biases_run_offline_without_a_login(corpus):
    short = ("--train-iters", "2", "--lr-warmup-iters", "0", "--set", "wandb.enabled=true")
    result = launch(corpus, "python", 1, "--run-name", "wandb", *short)
    assert list((corpus / "runs" / "wandb" / "wandb").rglob("run-*.wandb"))
    assert "wandb sync" in result.stdout


def test_errors_are_one_message_with_an_exit_code(corpus):
    for arguments, code, words in [
        (("--num-layer", "4"), 2, "did you mean --num-layers"),
        (("--data-path", "nowhere"), 3, "nowhere"),
        (("--load", "nowhere"), 4, "nowhere"),
        (("--vocab-size", "100"), 2, "512"),
    ]:
        result = launch(corpus, "python", 1, "--run-name", "wrong", *arguments, check=False)
        assert result.returncode == code, result.stderr
        assert words in result.stderr and "Traceback" not in result.stderr


def test_corrupt_data_is_named_before_step_0(corpus, tmp_path):
    broken = tmp_path / "broken"
    content = bytearray((corpus / "corpus.bin").read_bytes())
    content[100:102] = (65535).to_bytes(2, "little")
    broken.with_suffix(".bin").write_bytes(content)
    broken.with_suffix(".idx").write_bytes((corpus / "corpus.idx").read_bytes())
    result = launch(corpus, "python", 1, "--run-name", "corrupt", "--data-path", str(broken), check=False)
    assert result.returncode == 3
    assert "65535" in result.stderr and "broken.bin" in result.stderr
    assert json.loads((corpus / "runs" / "corrupt" / "status.json").read_text())["state"] == "failed"
