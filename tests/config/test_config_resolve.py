"""Completing a configuration: batches, automatic learning rate, vocabulary, differences."""

from itertools import product

import pytest

from megatron_ds.config.blend import parse_blend, parse_split
from megatron_ds.config.problems import Problem
from megatron_ds.config.resolve import (
    Batch,
    complete_batch,
    config_difference,
    data_parallel_size,
    nearest_multiples,
    resolve,
    with_values,
    with_vocabulary,
)
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import ConfigError


def with_batch(train, micro, steps) -> RunConfig:
    return RunConfig(train_batch_size=train, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps)


def test_a_complete_batch_agrees_with_what_was_given_and_a_problem_means_that_none_does():
    """Oracle: all batches of small sizes, tried one by one."""
    sizes = (None, 1, 2, 3, 4, 6)
    for train, micro, steps, ranks in product((*sizes, 12), sizes, sizes, (1, 2, 3)):
        result = complete_batch(with_batch(train, micro, steps), ranks)
        possible = [
            Batch(m * s * ranks, m, s)
            for m, s in product(range(1, 13), repeat=2)
            if train in (None, m * s * ranks) and micro in (None, m) and steps in (None, s)
        ]
        if isinstance(result, Problem):
            assert possible == [], (train, micro, steps, ranks)
        else:
            assert result in possible, (train, micro, steps, ranks)


def test_the_data_axis_takes_the_rest_of_the_world():
    config = with_values(RunConfig(), {("megatron_ds", "parallel", "pipeline_model_parallel_size"): 3})
    assert data_parallel_size(config, 12) == 4
    assert data_parallel_size(config, 4) is None


@pytest.mark.parametrize(("value", "unit", "words"), [(5, 3, "3 or 6"), (2, 3, "3"), (7, 1, "7 or 8")])
def test_nearest_multiples(value, unit, words):
    assert nearest_multiples(value, unit) == words


def test_resolve_fills_in_what_follows():
    config = resolve(with_batch(512, 4, None), 4, "name")
    assert config.gradient_accumulation_steps == 32
    assert config.optimizer.params.lr == 1e-3
    assert config.megatron_ds.monitor.run_name == "name"
    assert resolve(config, 4) == config
    assert config_difference(with_batch(512, 4, None), config) == [
        "gradient_accumulation_steps: null -> 32",
        'optimizer.params.lr: "auto" -> 0.001',
        'megatron_ds.monitor.run_name: null -> "name"',
    ]


def test_a_difference_of_kinds_shows_what_one_side_lacks():
    full = RunConfig(megatron_ds={"model": {"attention": {"kind": "full"}}})
    assert config_difference(RunConfig(), full) == [
        'megatron_ds.model.attention.kind: "hybrid" -> "full"',
        'megatron_ds.model.attention.pattern: "LLLG" -> not set',
        "megatron_ds.model.attention.window: 256 -> not set",
        "megatron_ds.model.attention.window_growth: null -> not set",
    ]
    assert len(config_difference(full, RunConfig())) == 4


def test_the_vocabulary_comes_from_the_tokenizer_unless_given():
    config = with_vocabulary(RunConfig(), 1000, 3)
    assert config.megatron_ds.model.vocab_size == 1000
    assert config.megatron_ds.model.padded_vocab_size == 1024
    assert config.megatron_ds.data.eod_id == 3
    given = RunConfig(megatron_ds={"model": {"vocab_size": 2000}, "data": {"eod_id": 1500}})
    assert with_vocabulary(given, 1000, 3) == given
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 999: the tokenizer has 1000 tokens; set it to 1000"):
        with_vocabulary(RunConfig(megatron_ds={"model": {"vocab_size": 999}}), 1000, 3)
    with pytest.raises(ConfigError, match=r"data\.eod_id = 1000: must be below the vocabulary size 1000"):
        with_vocabulary(RunConfig(megatron_ds={"data": {"eod_id": 1000}}), 1000, 3)


def test_blends():
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", " b ", "c"]) == (["a", "b", "c"], None)
    prefixes, weights = parse_blend(["0.3", "a", "7e-1", "b"])
    assert prefixes == ["a", "b"]
    assert sum(weights) == 1
    for words in ([], ["0.3"], ["0.3", "a", "0.7"], ["a", "1"], ["-1", "a"], ["nan", "a"], ["1", ""]):
        with pytest.raises(ConfigError):
            parse_blend(words)


def test_splits():
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("1") == (1, 0, 0)
    assert parse_split(" 3 , 1 ") == (0.75, 0.25, 0)
    for text in ("0,0", "1,2,3,4", "a", "1,,2", "-1,2", "inf,1"):
        with pytest.raises(ConfigError):
            parse_split(text)
