"""How often to save: every so many steps, or as often as pays.

A save costs training some seconds; a failure costs what was computed since the last one, on average half an interval.
The sum is least when saves are sqrt(2 x cost of a save x mean time between failures) apart (Young 1974, Daly 2006).
``auto`` measures the cost in the run itself: it saves after ten steps, and from the second save on knows better.
"""

import math
from collections import deque
from typing import Literal

PROBE_STEPS = 10
"""Steps before the first saves, which show what a save costs."""
WINDOW = 100
"""Steps whose mean duration counts."""
SECONDS_PER_DAY = 86400.0


class SaveInterval:
    """Says when a save is due; the same on every rank, as long as ``saved`` is told the same."""

    def __init__(
        self, interval: int | Literal["auto"] | None, *, step: int, num_nodes: int, node_days_per_failure: float
    ) -> None:
        """``interval`` in steps; ``step``: those already done; ``num_nodes`` fail independently."""
        self._interval = interval
        self._next = step + PROBE_STEPS
        self._seconds_between_failures = node_days_per_failure * SECONDS_PER_DAY / num_nodes
        self._step_seconds: deque[float] = deque(maxlen=WINDOW)
        self._cost: tuple[float, float] | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the interval follows from measurements."""
        return self._interval == "auto"

    def due(self, step: int) -> bool:
        """Whether to save after ``step``."""
        if self._interval is None:
            return False
        return step >= self._next if self.is_auto else step % self._interval == 0

    def took_step(self, seconds: float) -> None:
        """Count the duration of a step."""
        self._step_seconds.append(seconds)

    def took_save(self, stall_seconds: float, write_seconds: float) -> None:
        """Count what a save cost: how long training waited, how long until the checkpoint was whole."""
        self._cost = stall_seconds, write_seconds

    def estimate(self) -> int:
        """Steps until the next save, from this rank's measurements."""
        if self._cost is None or not self._step_seconds:
            return PROBE_STEPS
        stall, write = self._cost
        # A save that has not ended when the next is due would make training wait for it.
        seconds = max(math.sqrt(2 * stall * self._seconds_between_failures), 2 * write)
        return max(1, round(seconds * len(self._step_seconds) / sum(self._step_seconds)))

    def saved(self, step: int, steps_until_next: int) -> None:
        """Go on from a save after ``step``; all ranks were given the same estimate."""
        self._next = step + steps_until_next
