"""Weighted mixture of datasets: position k of the mixture -> (dataset, its sample), a pure function of the weights.

The weights become whole numbers a_i with sum M, and a blend is one pattern of M positions, repeated for ever, where
dataset i comes a_i times. The pattern is a fair schedule (earliest deadline first over the windows of Baruah et al.
1996, "Proportionate progress"): after every prefix of k positions each dataset has come k a_i / M times, give or take
less than one. So no stretch of training sees a distorted mixture, and nothing depends on how long the training is.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_ds.errors import ConfigError

MAX_PERIOD = 1 << 20
"""Weights that need a longer pattern are rounded to this many parts, which takes half a second to lay out."""


class Blend:
    """The mixture of ``len(weights)`` datasets. Weights are exact (Fraction or int) and need no normalisation.

    Raises ConfigError if a weight is below 1 / MAX_PERIOD of their sum.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        self.counts = np.array(_whole_numbers(weights), np.int64)
        """int64[datasets]: positions of each dataset in one pattern."""
        self.period = int(self.counts.sum())
        self._dataset = np.array(_fair_schedule(self.counts.tolist()), np.int32)
        # For each position of the pattern, how often its dataset came before.
        self._rank = np.empty(self.period, np.int64)
        by_dataset = np.argsort(self._dataset, kind="stable")
        self._rank[by_dataset] = np.arange(self.period) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)

    @property
    def shares(self) -> np.ndarray:
        """float64[datasets]: weights with sum one, as they are kept."""
        return self.counts / self.period

    def locate(self, k: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset position ``k`` takes, and which of its samples: two arrays of the shape of ``k``."""
        round_number, position = np.divmod(k, self.period)
        dataset = self._dataset[position]
        return dataset, round_number * self.counts[dataset] + self._rank[position]

    def length(self, sizes: Sequence[int]) -> int:
        """Length of the longest prefix that takes no more than ``sizes[i]`` samples of any dataset i."""
        sizes = np.array(sizes, np.int64)
        rounds = int((sizes // self.counts).min())
        exhausted = rounds * self.counts[self._dataset] + self._rank >= sizes[self._dataset]
        return rounds * self.period + int(np.argmax(exhausted))


def _whole_numbers(weights: Sequence[Fraction | int]) -> list[int]:
    """Whole numbers in the proportion of the weights: exact if their sum stays below MAX_PERIOD, else rounded to it."""
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [int(share * MAX_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_PERIOD)
    for i in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        i = counts.index(0)
        raise ConfigError(
            f"data.data_path: dataset {i + 1} of {len(weights)} has {float(shares[i]):.2g} of the blend, less than one "
            f"sample in {MAX_PERIOD:,}; leave it out or give it more weight"
        )
    return counts


def _fair_schedule(counts: list[int]) -> list[int]:
    """One pattern: the dataset of each position.

    Sample j (from 0) of dataset i may come from position j M / a_i on (rounded down) and must have come before position
    (j + 1) M / a_i (rounded up); of those that may, the one that must first is taken.
    """
    period = sum(counts)
    waiting = [(0, i) for i in range(len(counts))]
    ready: list[tuple[int, int]] = []
    taken = [0] * len(counts)
    pattern = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, i = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(taken[i] + 1) * period // counts[i]), i))
        _, i = heapq.heappop(ready)
        pattern.append(i)
        taken[i] += 1
        heapq.heappush(waiting, (taken[i] * period // counts[i], i))
    return pattern
