"""Runs in which the batch, the learning rate and the MTP weight change, interrupted in the middle: the same curve."""

import math

import pytest
from runs import cli, launch, ledger, make_corpus

pytestmark = pytest.mark.launch

GROWING = (
    "--train-samples", "80", "--global-batch-size", "12", "--rampup-batch-size", "4", "4", "24",
    "--lr-warmup-iters", "none", "--lr-warmup-samples", "8", "--lr-phases", "2K:constant", "4K:cosine:1e-3",
    "--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "0:0.3 2K:0.1", "--eval-interval", "none",
)  # fmt: skip
MEASURED = ("train/loss", "train/mtp_loss", "optim/grad_norm", "optim/lr", "train/batch_size", "progress/samples")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("growth"))


LONGER = (
    "--finetune", "--load", "runs/straight/checkpoints", "--train-iters", "4",
    "--lr-warmup-iters", "0", "--eval-interval", "none", "--seq-length", "128", "--rope-scaling", "yarn",
    "--rope-scaling-factor", "2", "--rope-scaling-original-max-position-embeddings", "64", "--mtp-num-layers", "1",
    "--ema-decay", "0.9",
)  # fmt: skip


def curve(corpus, run):
    return [[row[name] for name in MEASURED] for row in ledger(corpus, run)]


@pytest.fixture(scope="module")
def straight(corpus):
    launch(corpus, "python", 1, "--run-name", "straight", *GROWING)
    return curve(corpus, "straight")


def test_the_batch_grows_and_the_rate_falls_by_the_tokens(straight):
    rates, sizes, samples = ([row[MEASURED.index(name)] for row in straight] for name in MEASURED[3:])
    assert sizes == [4, 4, 4, 8, 8, 12, 12, 12, 12]
    assert samples == [4, 8, 12, 20, 28, 40, 52, 64, 76]
    tokens = [64 * (after - size) for after, size in zip(samples, sizes)]
    for rate, consumed in zip(rates[3:], tokens[3:], strict=True):
        share = min(1.0, max(0.0, (consumed - 2000) / 2000))
        assert rate == pytest.approx(1e-3 + 2e-3 * 0.5 * (1 + math.cos(math.pi * share)))
    assert rates[:3] == [0.0, 1.5e-3, 3e-3]


def test_stopping_on_the_way_equals_the_straight_run(corpus, straight):
    """After step 3 the batch is about to grow, after step 6 the rate is about to fall."""
    for step in (3, 6, 9):
        launch(corpus, "python", 1, "--run-name", "stopped", *GROWING, "--exit-interval", "3")
        assert curve(corpus, "stopped") == straight[:step]


def test_a_longer_context_begins_with_the_weights_alone_and_can_be_stopped_too(corpus, straight):
    said = launch(corpus, "python", 1, *LONGER, "--run-name", "longer", "--exit-interval", "2").stdout
    assert "begins with the weights in runs/straight/checkpoints/global_step9" in said
    said = launch(corpus, "python", 1, *LONGER, "--run-name", "longer").stdout
    assert "resumed at step 2 from runs/longer/checkpoints" in said
    rows = ledger(corpus, "longer")
    assert [(row["step"], row["progress/tokens"]) for row in rows] == [(n, n * 8 * 128) for n in (1, 2, 3, 4)]
    assert rows[0]["train/loss"] < straight[2][0], "not a model that has learnt nothing"
    refused = launch(corpus, "python", 1, *LONGER, "--run-name", "straight", check=False)
    assert refused.returncode == 2 and "finetune begins another one" in refused.stderr


def test_the_running_mean_is_exported(corpus, straight):
    launch(corpus, "python", 1, *LONGER, "--run-name", "mean")
    export = ("export-hf", "--mtp", "drop", "--ema", "--output", "mean", "--load")
    cli(corpus, *export, "runs/mean/checkpoints", "--verify")
    without = cli(corpus, *export, "runs/straight/checkpoints", "--force", check=False)
    assert without.returncode == 4 and "train with --ema-decay" in without.stderr
