"""A running mean of the weights, kept on the CPU: what is evaluated or exported instead of the last step's weights.

After every step mean = decay * mean + (1 - decay) * weight, in fp32, over the master weights that this rank owns: one
flat mean per tensor of the optimizer's (``state.Slot.owner``), so that it is shared out and saved as they are. A step
waits for the copy off the device at most: the arithmetic runs in a thread of its own, beside the next step. Where the
mean starts, and that it is not updated by a skipped step, is the trainer's business.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_ds.engine.state import slots


class WeightAverage:
    """The means of this rank's weights; they start as the weights are."""

    def __init__(self, engine: DeepSpeedEngine, weights: dict[str, Tensor], decay: float) -> None:
        """``decay`` is the weight of the past, 0 < decay < 1."""
        self.decay = decay
        owners = {id(slot.owner): slot.owner for slot in slots(engine, weights)}
        self._owners = list(owners.values())
        self._number = {key: number for number, key in enumerate(owners)}
        # Page-locked memory lets an accelerator copy while it computes.
        locked = any(owner.device.type != "cpu" for owner in self._owners)
        self._copies = [torch.empty(owner.shape, dtype=torch.float32, pin_memory=locked) for owner in self._owners]
        self._means = [torch.empty(owner.shape, dtype=torch.float32) for owner in self._owners]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight_average")
        self._pending: Future[None] | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present weights."""
        self._wait()
        for mean, owner in zip(self._means, self._owners, strict=True):
            mean.copy_(owner)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._wait()
        for copy, owner in zip(self._copies, self._owners, strict=True):
            copy.copy_(owner)
        self._pending = self._thread.submit(self._add)

    def of(self, owner: Tensor) -> Tensor:
        """The mean of a tensor of the optimizer's, in its shape, fp32 and on the CPU; may be written to."""
        self._wait()
        return self._means[self._number[id(owner)]]

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @torch.no_grad()
    def _add(self) -> None:
        for mean, copy in zip(self._means, self._copies, strict=True):
            mean.lerp_(copy, 1.0 - self.decay)
