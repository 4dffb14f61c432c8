"""The learning rate as a pure function of how far training has come: optimizer steps, samples, tokens.

Megatron-LM's curves (``OptimizerParamScheduler``), without its state: nothing is counted, saved or restored, so that
resuming, going back or asking about a step in the future needs only these numbers. Two runs with the same section and
peak have the same curve. Weight decay is constant and belongs to the optimizer.
"""

import math
from collections.abc import Callable

from megatron_ds.config.lr_plan import lengths, phases
from megatron_ds.config.schema import TrainingConfig

DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Share of (peak - min_lr) that is left after the share ``progress`` of a decay; 1 at 0 and 0 at 1."""


class LearningRate:
    """Warmup, then the decay of ``lr_decay_style``, then ``min_lr``; or the phases of ``lr_phases``.

    The three parts of a run with W warmup steps and D decay steps are: steps 0..W rise linearly from
    ``lr_warmup_init`` to the peak, steps W..D decay, later steps stay at ``min_lr`` (``constant`` stays at the peak).
    With ``train_samples`` all of this is in samples. Phases begin after the warmup, and end at numbers of tokens; after
    the last one its rate stays. See docs/learning_rate.md.
    """

    def __init__(self, training: TrainingConfig, peak: float, warmup_tokens: int = 0) -> None:
        """Fix the curve.

        Args:
            training: The section that holds the schedule.
            peak: Highest learning rate, ``optimizer.params.lr`` after "auto" has been resolved.
            warmup_tokens: Tokens consumed at the end of the warmup (``lr_plan.warmup_tokens``), for ``lr_phases``.

        That the phases fit and nothing exceeds the peak has been checked with the configuration.
        """
        self.peak = peak
        self.min_lr = training.min_lr
        self.warmup_init = training.lr_warmup_init
        self.style = training.lr_decay_style
        self.wsd_style = training.lr_wsd_decay_style
        self.lengths = lengths(training)
        self.phases = phases(training)
        self.warmup_tokens = warmup_tokens

    def at(self, step: int, samples: int = 0, tokens: int = 0) -> float:
        """Learning rate of the optimizer step before which so much is done; all are 0 at the first one.

        Args:
            step: optimizer steps.
            samples: samples consumed; read only by runs that are counted in samples.
            tokens: tokens consumed; read only by ``lr_phases``.
        """
        done = samples if self.lengths.unit == "samples" else step
        warmup, decay = self.lengths.warmup, self.lengths.decay
        if warmup > 0 and done <= warmup:
            return self.warmup_init + (self.peak - self.warmup_init) * done / warmup
        if self.phases:
            return self._in_phases(tokens)
        if self.style == "constant":
            return self.peak
        if done > decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.peak * math.sqrt(max(warmup, 1) / max(done, 1)))
        return self.min_lr + (self.peak - self.min_lr) * self._share_left(done)

    def _share_left(self, done: int) -> float:
        """Share of (peak - min_lr) that is left at ``done`` of the decay phase."""
        warmup, decay, wsd = self.lengths.warmup, self.lengths.decay, self.lengths.wsd
        if self.style == "WSD":
            decayed = done - (decay - wsd)
            return DECAY[self.wsd_style](decayed / wsd) if decayed > 0 else 1.0
        return DECAY[self.style]((done - warmup) / (decay - warmup))

    def _in_phases(self, tokens: int) -> float:
        """Learning rate after the warmup where there are phases; one that ends at ``tokens`` is over."""
        begin, rate = self.warmup_tokens, self.peak
        for phase in self.phases:
            end = rate if phase.lr is None else phase.lr
            if tokens < phase.until:
                progress = (tokens - begin) / (phase.until - begin)
                if phase.style == "exponential":
                    return rate * (end / rate) ** progress
                return end if phase.style == "constant" else end + (rate - end) * DECAY[phase.style](progress)
            begin, rate = phase.until, end
        return rate
