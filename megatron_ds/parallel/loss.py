"""Cross-entropy over a large vocabulary: a sum over counted tokens, with one logits-sized buffer for its gradient.

Logits dominate memory at a small width, so both passes go through them a few rows at a time: the forward pass keeps
nothing but the logits, the backward pass writes softmax - onehot straight into the gradient. Dividing by the number of
counted tokens is the caller's, who knows the whole global batch.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**19
"""Logits handled at a time: two megabytes in fp32, which stay in cache."""


def cross_entropy_sum(logits_TV: Tensor, label_T: Tensor, counted_T: Tensor, vocab_size: int) -> Tensor:
    """Sum over counted tokens of -log p(label), a scalar in fp32.

    Args:
        logits_TV: logits over the padded vocabulary, in any floating dtype.
        label_T: int64 target ids below vocab_size; ignored where not counted.
        counted_T: bool, which targets enter the loss.
        vocab_size: true vocabulary; columns from here on get no probability.
    """
    return _CrossEntropySum.apply(logits_TV, label_T, counted_T, vocab_size)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, label_T: Tensor, counted_T: Tensor, vocab_size: int) -> Tensor:
        label_T1 = label_T.where(counted_T, 0).unsqueeze(1)
        ctx.save_for_backward(logits_TV, label_T1, counted_T)
        ctx.vocab_size = vocab_size
        log_probability_T1 = torch.empty(label_T1.shape, dtype=torch.float32, device=logits_TV.device)
        rows = _rows(logits_TV)
        for logits, label, out in zip(logits_TV.split(rows), label_T1.split(rows), log_probability_T1.split(rows)):
            torch.gather(logits[:, :vocab_size].float().log_softmax(-1), 1, label, out=out)
        return -log_probability_T1.squeeze(1).where(counted_T, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, label_T1, counted_T = ctx.saved_tensors
        scale_T1 = (counted_T * grad).unsqueeze(1)
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.vocab_size :] = 0
        rows = _rows(logits_TV)
        for logits, label, scale, out in zip(*(x.split(rows) for x in (logits_TV, label_T1, scale_T1, grad_TV))):
            probability = logits[:, : ctx.vocab_size].float().softmax(-1)
            probability.scatter_add_(1, label, probability.new_full((), -1.0).expand(label.shape))
            torch.mul(probability, scale, out=out[:, : ctx.vocab_size])
        return grad_TV, None, None, None


def _rows(logits_TV: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits_TV.shape[1])
