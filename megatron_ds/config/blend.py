"""The two small languages inside data settings: blends (``0.3 a 0.7 b``) and splits (``969,30,1``).

Megatron's grammars. The rules read them to refuse what is no blend or split, the data reads them for what they say.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from math import isfinite

from megatron_ds.errors import ConfigError

SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What an evaluation set may be called, since its name becomes part of metric names."""


def parse_blend(words: Sequence[str]) -> tuple[list[str], list[Fraction] | None]:
    """Prefixes and their exact weights; None instead of weights when there are only prefixes.

    Raises ConfigError when weights and prefixes do not alternate, or a weight is not a number > 0.
    """
    words = [word.strip() for word in words]
    if not words or "" in words:
        raise ConfigError("a prefix is empty")
    numbers = [_number(word) for word in words]
    paired = len(words) % 2 == 0
    weighted = [number is not None for number in numbers[0::2]]
    if not any(weighted) and not (paired and None not in numbers[1::2]):
        return words, None
    if not (paired and all(weighted)):
        raise ConfigError("weights and prefixes must alternate (a prefix that is a number is written ./7)")
    for word, number in zip(words[0::2], numbers[0::2], strict=True):
        if not isfinite(number) or number <= 0:
            raise ConfigError(f"weight {word} must be a number > 0 (to leave the dataset out, delete it)")
    return words[1::2], [Fraction(word) for word in words[0::2]]


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of training, validation and test with sum one; a share that is not given is zero.

    Raises ConfigError unless there are one to three numbers >= 0 that are not all zero.
    """
    shares = [_number(word) for word in text.split(",")]
    if not 1 <= len(shares) <= 3 or any(share is None or not isfinite(share) or share < 0 for share in shares):
        raise ConfigError("must be one to three numbers >= 0")
    if not any(shares):
        raise ConfigError("one share must be above 0")
    train, validation, test = (share / sum(shares) for share in [*shares, 0.0, 0.0][:3])
    return train, validation, test


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
