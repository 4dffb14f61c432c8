"""Runs in which the batch, the learning rate and the MTP weight change, interrupted in the middle: the same curve."""

import math

import pytest
from runs import launch, ledger, make_corpus

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
