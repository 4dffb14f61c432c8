"""The learning rate as a pure function of the optimizer step.

Megatron-LM's curves (``OptimizerParamScheduler``), without its state: nothing is counted, saved or restored, so that
resuming, going back or asking about a step in the future needs only the step. Two runs with the same section and peak
have the same curve. Weight decay is constant and belongs to the optimizer.
"""

import math
from collections.abc import Callable

from megatron_ds.config.schema import TrainingConfig

DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Share of (peak - min_lr) that is left after the share ``progress`` of a decay; 1 at 0 and 0 at 1."""


class LearningRate:
    """Warmup, then the decay of ``lr_decay_style``, then ``min_lr``; see docs/learning_rate.md.

    The three phases of a run with W warmup steps and D decay steps are: steps 0..W rise linearly from
    ``lr_warmup_init`` to the peak, steps W..D decay, later steps stay at ``min_lr`` (``constant`` stays at the peak).
    """

    def __init__(self, training: TrainingConfig, peak: float) -> None:
        """Fix the curve.

        Args:
            training: The section that holds the schedule.
            peak: Highest learning rate, ``optimizer.params.lr`` after "auto" has been resolved.

        That the phases fit and nothing exceeds the peak has been checked with the configuration.
        """
        self.peak = peak
        self.min_lr = training.min_lr
        self.warmup_init = training.lr_warmup_init
        self.style = training.lr_decay_style
        self.decay_steps = training.lr_decay_iters or training.train_iters
        # A share of the steps is not rounded to whole ones: Megatron does not either.
        share = training.lr_warmup_fraction
        self.warmup_steps = share * self.decay_steps if share is not None else training.lr_warmup_iters or 0
        self.wsd_style = training.lr_wsd_decay_style
        self.wsd_steps = training.lr_wsd_decay_iters or math.ceil(self.decay_steps / 10)

    def at(self, step: int) -> float:
        """Learning rate of the optimizer step ``step``, where 0 is the first one."""
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return self.warmup_init + (self.peak - self.warmup_init) * step / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if step > self.decay_steps:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.peak * math.sqrt(max(self.warmup_steps, 1) / max(step, 1)))
        return self.min_lr + (self.peak - self.min_lr) * self._share_left(step)

    def _share_left(self, step: int) -> float:
        """Share of (peak - min_lr) that is left at ``step`` of the decay phase."""
        if self.style == "WSD":
            decayed = step - (self.decay_steps - self.wsd_steps)
            return DECAY[self.wsd_style](decayed / self.wsd_steps) if decayed > 0 else 1.0
        return DECAY[self.style]((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
