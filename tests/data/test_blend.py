"""Blends: right shares in every prefix, each dataset in its own order, nothing depends on the length."""

from fractions import Fraction

import numpy as np
import pytest

from megatron_ds.data import blend as blend_module
from megatron_ds.data.blend import Blend
from megatron_ds.errors import ConfigError


def random_weights(generator):
    """One to nine weights of very different sizes, some equal."""
    count = int(generator.integers(1, 10))
    scale = int(generator.choice([1, 5, 100, 3000]))
    return [Fraction(int(w), int(generator.integers(1, 4))) for w in generator.integers(1, scale + 1, count)]


@pytest.mark.parametrize("seed", range(60))
def test_shares_and_order_of_every_prefix(seed):
    weights = random_weights(np.random.default_rng(seed))
    blend = Blend(weights)
    dataset, sample = blend.locate(np.arange(2 * blend.period + 1))
    # taken[k, i]: samples of dataset i in the first k + 1 positions.
    taken = np.cumsum(dataset[:, None] == np.arange(len(weights)), axis=0)
    own = taken[np.arange(len(dataset)), dataset]
    assert np.array_equal(sample, own - 1), "each dataset is read from its first sample on, without gaps"
    parts = np.array([int(weight * 6) for weight in weights])  # whole, since the denominators are 1, 2 and 3
    wanted = np.arange(1, len(dataset) + 1)[:, None] * parts
    assert np.all(np.abs(taken * parts.sum() - wanted) < parts.sum())


def test_random_access_equals_the_whole():
    blend = Blend([3, 7, 1])
    dataset, sample = blend.locate(np.arange(200))
    for k in np.random.default_rng(0).permutation(200):
        assert tuple(map(int, blend.locate(int(k)))) == (dataset[k], sample[k])
    far = 11 * 10**12
    assert np.array_equal(blend.locate(far + np.arange(11))[0], dataset[:11])
    assert np.array_equal(
        blend.locate(far + np.arange(11))[1], sample[:11] + 10**12 * np.array([3, 7, 1])[dataset[:11]]
    )


def test_scale_of_weights_does_not_matter():
    a, b = Blend([Fraction("0.3"), Fraction("0.7")]), Blend([30, 70])
    assert a.period == b.period == 10 and a.shares.tolist() == [0.3, 0.7]
    assert np.array_equal(a.locate(np.arange(50)), b.locate(np.arange(50)))


@pytest.mark.parametrize("seed", range(30))
def test_length_is_the_longest_prefix(seed):
    generator = np.random.default_rng(seed)
    blend = Blend(random_weights(generator))
    sizes = generator.integers(0, 30, len(blend.counts))
    dataset, sample = blend.locate(np.arange(30 * blend.period + 1))
    too_much = sample >= sizes[dataset]
    assert blend.length(sizes) == np.argmax(too_much)


def test_sizes_as_weights_cover_everything_once():
    sizes = [13, 4, 90, 1]
    blend = Blend(sizes)
    assert blend.length(sizes) == sum(sizes)


def test_odd_weights_are_rounded_to_the_longest_pattern(monkeypatch):
    monkeypatch.setattr(blend_module, "MAX_PERIOD", 1000)
    blend = Blend([Fraction(1, 3), Fraction(1, 7), Fraction(11, 21) + Fraction(1, 10**9)])
    assert blend.period == 1000 and blend.counts.tolist() == [333, 143, 524]
    with pytest.raises(ConfigError, match=r"dataset 2 of 2 has 0\.0005 of the blend, less than one sample in 1,000"):
        Blend([1999, 1])
