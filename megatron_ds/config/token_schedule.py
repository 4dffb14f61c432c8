"""Values that change with the tokens consumed, and how numbers of tokens are written.

A schedule is a number, or ``tokens:value`` pairs in Megatron's form, ``"0:0.001 14.3T:0"``: each value holds from its
token on. The configuration keeps the text as it was given; ``TokenSchedule.parse`` makes of it a pure function of the
tokens consumed, so that nothing about it is ever stored or restored. That tokens ascend is asked in
``schedule_rules.py``.
"""

from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

from pydantic import Field

from megatron_ds.config.deepspeed_keys import NonNegativeFloat
from megatron_ds.config.values import Form

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT = r"\d+(\.\d+)?[KMBT]?"
NUMBER = r"\d+(\.\d+)?([eE][+-]?\d+)?"

Scheduled = (
    NonNegativeFloat
    | Annotated[
        str, Field(pattern=rf"^0:{NUMBER}( +{COUNT}:{NUMBER})*$"), Form('of tokens:value pairs as "0:0.001 14.3T:0"')
    ]
)
"""A number, or one that changes with the tokens consumed."""
ScheduledBatch = Annotated[
    str, Field(pattern=rf"^0:[1-9]\d*( +{COUNT}:[1-9]\d*)*$"), Form('of tokens:batch pairs as "0:768 250B:1536"')
]
"""A batch size that changes with the tokens consumed."""


def parse_count(text: str) -> int:
    """The number that ``14.3T`` stands for, exactly: K, M, B and T are 10^3, 10^6, 10^9 and 10^12.

    A fraction of one is dropped.
    """
    digits = text.rstrip("KMBT")
    return int(Decimal(digits) * UNITS[text[len(digits) :]])


@dataclass(frozen=True)
class TokenSchedule:
    """A step function of the tokens consumed."""

    starts: tuple[int, ...]
    """Tokens from which each value holds; the first is 0."""
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: float | str) -> "TokenSchedule":
        """The schedule of a valid ``Scheduled`` or ``ScheduledBatch``."""
        if not isinstance(text, str):
            return cls((0,), (text,))
        pairs = [pair.split(":") for pair in text.split()]
        return cls(tuple(parse_count(start) for start, _ in pairs), tuple(float(value) for _, value in pairs))

    def at(self, tokens: int) -> float:
        """The value once ``tokens`` have been consumed."""
        return self.values[bisect_right(self.starts, tokens) - 1]
