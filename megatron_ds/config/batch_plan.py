"""The global batch size of every step, where it grows during a run.

A batch size is a pure function of the samples consumed before the step, as the loader is: the checkpoint's number of
samples is its whole state. Both of Megatron's forms become one step function over samples: a ramp
(``rampup_batch_size``) and steps at given tokens (``step_batch_size_schedule``). Whether every size on the way can be
shared out among ranks is asked in ``schedule_rules.py``.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ds.config.schema import TrainingConfig
from megatron_ds.config.token_schedule import TokenSchedule


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of the global batch, and the samples consumed from which each holds."""

    starts: tuple[int, ...]
    """Ascending; the first is 0."""
    sizes: tuple[int, ...]

    def at(self, samples: int) -> int:
        """Sequences in the global batch that begins after ``samples`` of them."""
        return self.sizes[bisect_right(self.starts, samples) - 1]

    def samples_after(self, steps: int) -> int:
        """Samples that the first ``steps`` steps consume."""
        for consumed, size, length in self._stretches():
            if length is None or steps <= length:
                return consumed + steps * size
            steps -= length
        raise AssertionError("the last stretch has no end")

    def steps_within(self, samples: int) -> int:
        """The most steps that consume no more than ``samples``."""
        steps = 0
        for consumed, size, length in self._stretches():
            possible = (samples - consumed) // size
            if length is None or possible < length:
                return steps + max(0, possible)
            steps += length
        raise AssertionError("the last stretch has no end")

    def _stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """Runs of steps of one size: samples consumed before it, the size, and how many steps; the last has no end."""
        consumed = 0
        for size, end in zip(self.sizes[:-1], self.starts[1:], strict=True):
            if consumed < end:
                length = -(-(end - consumed) // size)
                yield consumed, size, length
                consumed += length * size
        yield consumed, self.sizes[-1], None


def batch_plan(training: TrainingConfig, train_batch_size: int, seq_length: int) -> BatchPlan:
    """The plan of a run whose largest global batch is ``train_batch_size``.

    A ramp of start, increment and samples has equal shares of the samples for each size below the largest, as in
    Megatron. A size that holds from a number of tokens on begins with the first batch that has consumed as many.
    """
    if training.rampup_batch_size is not None:
        start, increment, samples = training.rampup_batch_size
        below = range(start, train_batch_size, increment)
        starts = (-(-samples * number // len(below)) for number in range(len(below)))
        return BatchPlan((*starts, samples if below else 0), (*below, train_batch_size))
    if training.step_batch_size_schedule is not None:
        steps = TokenSchedule.parse(training.step_batch_size_schedule)
        starts = tuple(-(-tokens // seq_length) for tokens in steps.starts)
        return BatchPlan(starts, tuple(int(size) for size in steps.values))
    return BatchPlan((0,), (train_batch_size,))
