"""Staging: a copy of what this rank saves, in main memory that is used again and again.

Training waits for this copy and for nothing else; whoever writes it to a disk takes its time. The memory is taken once,
since fresh pages cost more than the bytes that are copied into them, and it is page-locked when an accelerator is the
source, which then copies at full speed. What is copied, and when the memory is free again, is not known here.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_ds.checkpoint.pieces import Fragment

ALIGNMENT = 64
"""Bytes; enough for every dtype, and a cache line."""


class Staging:
    """Memory for one snapshot at a time; it grows to the largest."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def hold(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with copies of their values, which are right until the next call."""
        fragments = list(fragments)
        offsets, size = [], 0
        for fragment in fragments:
            offsets.append(size)
            size += -(-fragment.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        devices = {fragment.tensor.device.type for fragment in fragments} - {"cpu"}
        if size > self._memory.numel():
            del self._memory  # before the larger one is taken
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=bool(devices))
        copies = []
        for fragment, offset in zip(fragments, offsets, strict=True):
            source = fragment.tensor.detach()
            values = self._memory[offset : offset + source.nbytes].view(source.dtype)
            copies.append(replace(fragment, tensor=values.copy_(source, non_blocking=True)))
        if devices:
            torch.accelerator.synchronize()
        return copies
