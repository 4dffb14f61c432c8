"""Batch sizes against Megatron's ramp, a step at a time, and the lengths that follow from them."""

import pytest

from megatron_ds.config.batch_plan import BatchPlan, batch_plan
from megatron_ds.config.resolve import resolve
from megatron_ds.config.schema import RunConfig, TrainingConfig
from megatron_ds.config.token_schedule import TokenSchedule, parse_count


def megatrons_ramp(consumed, start, increment, ramp_samples, full):
    """The global batch of Megatron-LM's RampupBatchsizeNumMicroBatchesCalculator, formula by formula."""
    if consumed > ramp_samples or start == full:
        return full
    per_increment = ramp_samples / ((full - start) / increment)
    return start + int(consumed / per_increment) * increment


@pytest.mark.parametrize(
    ("ramp", "full"), [((4, 4, 100), 16), ((8, 8, 33), 24), ((2, 7, 1000), 16), ((16, 4, 9), 16), ((3, 1, 7), 10)]
)
def test_a_ramp_is_megatrons(ramp, full):
    plan = batch_plan(TrainingConfig(rampup_batch_size=ramp), full, 64)
    for consumed in range(ramp[2] + 50):
        assert plan.at(consumed) == megatrons_ramp(consumed, *ramp, full), consumed


def test_steps_begin_with_the_first_batch_that_has_consumed_the_tokens():
    plan = batch_plan(TrainingConfig(step_batch_size_schedule="0:4 1K:8 1.5K:12"), 12, 64)
    for consumed in range(60):
        tokens = 64 * consumed
        assert plan.at(consumed) == (4 if tokens < 1000 else 8 if tokens < 1500 else 12), consumed


def test_without_a_schedule_there_is_one_size():
    plan = batch_plan(TrainingConfig(), 6, 64)
    assert [plan.at(samples) for samples in (0, 6, 10**15)] == [6, 6, 6]
    assert plan.samples_after(10**9) == 6 * 10**9


@pytest.mark.parametrize(
    "plan",
    [
        BatchPlan((0,), (6,)),
        BatchPlan((0, 34, 67, 100), (4, 8, 12, 16)),
        BatchPlan((0, 10, 11, 12), (8, 2, 4, 16)),
        BatchPlan((0, 1, 2, 50), (40, 1, 3, 7)),
        BatchPlan((0, 0, 9), (5, 2, 4)),
    ],
    ids=lambda plan: str(plan.sizes),
)
def test_samples_and_steps_equal_taking_the_steps(plan):
    consumed = [0]
    while len(consumed) < 40:
        consumed.append(consumed[-1] + plan.at(consumed[-1]))
    assert [plan.samples_after(steps) for steps in range(40)] == consumed
    for samples in range(consumed[-1]):
        assert plan.steps_within(samples) == max(steps for steps, taken in enumerate(consumed) if taken <= samples)


def test_the_number_of_steps_follows_from_the_samples():
    training = {"train_samples": 170, "rampup_batch_size": [4, 4, 100]}
    tree = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "megatron_ds": {"training": training}}
    config = resolve(RunConfig.model_validate(tree), 2)
    plan = batch_plan(config.megatron_ds.training, 16, 2048)
    steps = config.megatron_ds.training.train_iters
    assert plan.samples_after(steps) <= 170 < plan.samples_after(steps + 1)
    assert resolve(config, 2) == config


@pytest.mark.parametrize(
    ("text", "number"),
    [("250B", 250 * 10**9), ("14.3T", 14_300_000_000_000), ("7", 7), ("1.0004K", 1000), ("0.1M", 100_000), ("0", 0)],
)
def test_numbers_with_a_unit_are_exact(text, number):
    assert parse_count(text) == number


def test_a_schedule_holds_from_its_token_on():
    schedule = TokenSchedule.parse("0:0.3 10T:1e-1  14.3T:0")
    tokens = (0, 10**13 - 1, 10**13, 14 * 10**12, 14_300_000_000_000, 10**15)
    assert [schedule.at(count) for count in tokens] == [0.3, 0.3, 0.1, 0.1, 0.0, 0.0]
    assert TokenSchedule.parse(0.25).at(10**15) == 0.25
