"""Weight gradients that can wait: a backward pass in two halves, as zero-bubble schedules need it (arXiv 2401.10241).

The previous stage waits for the gradient of an input, nobody waits for that of a weight. Layers whose weight gradient
is a product of its own ask ``weight_gradients`` for it in their backward pass; under ``deferring`` they get None, and
the product is left in a queue that runs later and adds to ``.grad``. Biases and norms, which cost nothing, do not wait.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

Queue = list[Callable[[], None]]

# A backward pass may run in a thread of autograd, so this cannot be local to the caller's.
_queue: Queue | None = None


@contextmanager
def deferring() -> Iterator[Queue]:
    """Collect the weight gradients of the backward passes inside; call the queue's entries, in order, to make up."""
    global _queue
    assert _queue is None, "one backward pass at a time"
    _queue = []
    try:
        yield _queue
    finally:
        _queue = None


def weight_gradients(
    weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor] | tuple[None, ...]:
    """What a backward pass returns for ``weights``: ``compute()``, or None for each of them if they wait.

    ``weights`` are the leaves that the forward pass got: what ``saved_tensors`` returns may be their aliases. Without a
    ``.grad`` of its own, a weight that is no leaf cannot wait.
    """
    if _queue is None or not all(weight.is_leaf for weight in weights):
        return compute()
    _queue.append(partial(_accumulate, weights, compute))
    return (None,) * len(weights)


@torch.no_grad()
def _accumulate(weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> None:
    """Add to ``.grad`` as autograd would."""
    for weight, gradient in zip(weights, compute(), strict=True):
        if weight.grad is None:
            weight.grad = gradient.to(weight.dtype)
        else:
            weight.grad += gradient
