"""The learning rate against a literal reading of Megatron's formulas, and its properties."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.config.batch_plan import BatchPlan
from megatron_ds.config.lr_plan import warmup_tokens
from megatron_ds.config.schema import TrainingConfig
from megatron_ds.optim.lr_schedule import DECAY, LearningRate

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


def megatron_lr(n, peak, floor, init, warmup, decay, style, wsd_style, wsd):
    """Megatron-LM's learning rate after n scheduler steps, formula by formula."""
    if warmup > 0 and n <= warmup:
        return init + (peak - init) * float(n) / float(warmup)
    if style == "constant":
        return peak
    if n > decay:
        return floor
    if style == "inverse-square-root":
        return max(floor, peak * max(warmup, 1) ** 0.5 / max(n, 1) ** 0.5)
    ratio = float(n - warmup) / float(decay - warmup)
    if style == "linear":
        left = 1.0 - ratio
    elif style == "cosine":
        left = 0.5 * (math.cos(math.pi * ratio) + 1.0)
    else:
        start = decay - wsd
        done = float(n - start) / float(wsd)
        if n <= start:
            left = 1.0
        elif wsd_style == "linear":
            left = 1.0 - done
        elif wsd_style == "cosine":
            left = 0.5 * (math.cos(math.pi * done) + 1.0)
        elif wsd_style == "exponential":
            left = 2.0 * math.pow(0.5, done) - 1.0
        else:
            left = 1.0 - math.sqrt(done)
    return floor + left * (peak - floor)


@st.composite
def curves(draw):
    """A training section whose phases fit, a peak, and the phase lengths."""
    decay = draw(st.integers(30, 400))
    warmup = draw(st.integers(0, decay // 2))
    wsd = draw(st.integers(1, decay // 2))
    peak = draw(st.floats(1e-5, 1e-2))
    training = TrainingConfig(
        train_iters=decay + draw(st.integers(0, 50)),
        lr_decay_iters=decay,
        lr_warmup_iters=warmup,
        lr_warmup_init=peak * draw(st.floats(0, 1)),
        min_lr=peak * draw(st.floats(0, 1)),
        lr_decay_style=draw(st.sampled_from(STYLES)),
        lr_wsd_decay_style=draw(st.sampled_from(sorted(DECAY))),
        lr_wsd_decay_iters=wsd,
    )
    return training, peak, warmup, wsd


@settings(max_examples=200, deadline=None)
@given(curves())
def test_equals_megatrons_formulas(curve):
    training, peak, warmup, wsd = curve
    rate = LearningRate(training, peak)
    for step in range(training.train_iters + 20):
        want = megatron_lr(
            step,
            peak,
            training.min_lr,
            training.lr_warmup_init,
            warmup,
            training.lr_decay_iters,
            training.lr_decay_style,
            training.lr_wsd_decay_style,
            wsd,
        )
        assert rate.at(step) == pytest.approx(want, rel=1e-12, abs=1e-18)


@settings(max_examples=200, deadline=None)
@given(curves())
def test_rises_then_falls_between_its_bounds(curve):
    training, peak, warmup, _ = curve
    rate = LearningRate(training, peak)
    values = [rate.at(step) for step in range(training.train_iters + 20)]
    eps = peak * 1e-12
    assert all(later >= earlier - eps for earlier, later in itertools.pairwise(values[: warmup + 1]))
    assert all(later <= earlier + eps for earlier, later in itertools.pairwise(values[warmup:]))
    assert max(values) == pytest.approx(peak)
    assert min(values[warmup:]) >= training.min_lr - eps
    assert values[-1] == (peak if training.lr_decay_style == "constant" else training.min_lr)


@settings(max_examples=100, deadline=None)
@given(curves())
def test_is_continuous_at_the_end_of_the_warmup(curve):
    training, peak, warmup, _ = curve
    rate = LearningRate(training, peak)
    assert rate.at(warmup) == pytest.approx(peak)
    assert rate.at(warmup + 1e-12) == pytest.approx(peak, rel=1e-4)


@given(curves(), st.randoms())
def test_does_not_depend_on_what_was_asked_before(curve, random):
    training, peak, _, _ = curve
    steps = list(range(0, training.train_iters, 7))
    forward = {step: LearningRate(training, peak).at(step) for step in steps}
    random.shuffle(steps)
    rate = LearningRate(training, peak)
    assert {step: rate.at(step) for step in steps} == forward


def test_warmup_as_a_fraction_of_the_decay():
    by_fraction = LearningRate(TrainingConfig(train_iters=1000, lr_warmup_fraction=0.05), 1e-3)
    by_steps = LearningRate(TrainingConfig(train_iters=1000, lr_warmup_iters=50), 1e-3)
    assert [by_fraction.at(step) for step in range(1001)] == [by_steps.at(step) for step in range(1001)]
    half = LearningRate(TrainingConfig(train_iters=10, lr_warmup_fraction=0.25), 1.0)
    assert [half.at(step) for step in range(3)] == [0.0, 0.4, 0.8]


def test_documented_defaults():
    rate = LearningRate(TrainingConfig(train_iters=100), 1e-3)
    assert rate.at(0) == 1e-3
    assert rate.at(50) == pytest.approx(5e-4)
    assert rate.at(100) == pytest.approx(0.0, abs=1e-18)
    wsd = LearningRate(TrainingConfig(train_iters=95, lr_decay_style="WSD"), 1e-3)
    assert wsd.at(85) == 1e-3
    assert wsd.at(86) == pytest.approx(1e-3 * (1 - math.sqrt(0.1)))


# --- samples and tokens ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(curves())
def test_a_curve_in_samples_is_the_curve_in_steps(curve):
    training, peak, warmup, wsd = curve
    in_samples = training.model_copy(
        update={
            "train_samples": training.train_iters,
            "lr_decay_iters": None,
            "lr_decay_samples": training.lr_decay_iters,
            "lr_warmup_iters": None,
            "lr_warmup_samples": warmup,
            "lr_wsd_decay_iters": None,
            "lr_wsd_decay_samples": wsd,
        }
    )
    by_steps, by_samples = LearningRate(training, peak), LearningRate(in_samples, peak)
    done = range(0, training.train_iters + 20, 3)
    assert [by_samples.at(7, samples=n) for n in done] == [by_steps.at(n) for n in done]


def test_the_share_of_a_warmup_is_one_of_the_samples():
    rate = LearningRate(TrainingConfig(train_samples=1000, lr_warmup_fraction=0.1), 1.0)
    assert rate.at(3, samples=50) == 0.5
    assert rate.at(3, samples=1000) == pytest.approx(0.0)


SEQ = 4096
BATCH = 15360
V3 = TrainingConfig(
    train_iters=235_000,
    lr_warmup_iters=2000,
    lr_phases=("10T:constant", "14.3T:cosine:2.2e-5", "14.633T:constant", "14.8T:constant:7.3e-6"),
)


def test_phases_of_deepseek_v3():
    """arXiv 2412.19437, 4.2: 2K steps of warmup, 2.2e-4 to 10T tokens, cosine over 4.3T, 333B, then 167B."""
    plan = BatchPlan((0,), (BATCH,))
    warm = warmup_tokens(V3, plan, SEQ)
    assert warm == 2000 * BATCH * SEQ
    rate = LearningRate(V3, 2.2e-4, warm)

    def at(tokens):
        return rate.at(tokens // (BATCH * SEQ), tokens=tokens)

    assert rate.at(1000, tokens=1000 * BATCH * SEQ) == pytest.approx(1.1e-4)
    assert [at(tokens) for tokens in (warm, 5 * 10**12, 10**13)] == [2.2e-4] * 3
    for share in (0.0, 0.25, 0.5, 0.999):
        want = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * share))
        assert at(10**13 + round(share * 4.3e12)) == pytest.approx(want, rel=1e-9)
    assert at(14_300_000_000_000) == at(14_632_999_999_999) == 2.2e-5
    assert at(14_633_000_000_000) == at(10**14) == 7.3e-6


def test_phases_begin_where_the_warmup_ends():
    training = TrainingConfig(train_samples=1000, lr_warmup_samples=8, lr_phases=("2K:linear:0", "3K:constant:0"))
    warm = warmup_tokens(training, BatchPlan((0,), (4,)), 64)
    rate = LearningRate(training, 1.0, warm)
    assert (warm, rate.at(2, samples=8, tokens=warm)) == (512, 1.0)
    assert rate.at(3, samples=9, tokens=512) == 1.0
    assert rate.at(3, samples=9, tokens=512 + (2000 - 512) // 2) == 0.5
    multi_step = TrainingConfig(lr_phases=("80:constant", "90:exponential:0.316", "100:constant:0.1"))
    rate = LearningRate(multi_step, 1.0)
    assert [rate.at(0, tokens=tokens) for tokens in (0, 79, 85, 90, 99, 200)] == [
        1.0, 1.0, pytest.approx(math.sqrt(0.316)), 0.1, 0.1, 0.1,
    ]  # fmt: skip


def test_the_warmup_in_steps_ends_after_the_samples_of_a_growing_batch():
    training = TrainingConfig(train_iters=100, lr_warmup_iters=5, lr_phases=("9K:constant",))
    assert warmup_tokens(training, BatchPlan((0, 6), (2, 4)), 10) == 10 * (2 + 2 + 2 + 4 + 4)
