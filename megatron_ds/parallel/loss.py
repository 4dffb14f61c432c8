"""Cross-entropy over a large vocabulary: a sum over counted tokens, with one logits-sized buffer for its gradient.

Logits dominate memory at a small width, so both passes go through them a few rows at a time: the forward pass keeps
nothing but the logits, the backward pass writes softmax - onehot straight into the gradient. Dividing by the number of
counted tokens is the caller's, who knows the whole global batch.

Tensor-parallel ranks have a run of the columns each. Of every row they exchange the largest logit, the sum of
exponentials relative to it, and the label's logit, all rows in one message; the backward pass needs none.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ds.parallel.tensor import ALONE, TensorRanks

CHUNK_ELEMENTS = 2**19
"""Logits handled at a time: two megabytes in fp32, which stay in cache."""


def cross_entropy_sum(
    logits_TV: Tensor, label_T: Tensor, counted_T: Tensor, vocab_size: int, tensor: TensorRanks = ALONE
) -> Tensor:
    """Sum over counted tokens of -log p(label), a scalar in fp32, the same on every rank.

    Args:
        logits_TV: this rank's logits over the padded vocabulary, in any floating dtype.
        label_T: int64 target ids below vocab_size; ignored where not counted.
        counted_T: bool, which targets enter the loss.
        vocab_size: true vocabulary; columns from here on get no probability.
        tensor: the ranks that have the columns, in order and each as many.
    """
    if tensor.size == 1:
        return _CrossEntropySum.apply(logits_TV, label_T, counted_T, vocab_size)
    return _ParallelCrossEntropySum.apply(logits_TV, label_T, counted_T, vocab_size, tensor)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, label_T: Tensor, counted_T: Tensor, vocab_size: int) -> Tensor:
        label_T1 = label_T.where(counted_T, 0).unsqueeze(1)
        ctx.save_for_backward(logits_TV, label_T1, counted_T)
        ctx.vocab_size = vocab_size
        log_probability_T1 = torch.empty(label_T1.shape, dtype=torch.float32, device=logits_TV.device)
        for logits, label, out in _chunks(logits_TV, label_T1, log_probability_T1):
            torch.gather(logits[:, :vocab_size].float().log_softmax(-1), 1, label, out=out)
        return -log_probability_T1.squeeze(1).where(counted_T, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, label_T1, counted_T = ctx.saved_tensors
        scale_T1 = (counted_T * grad).unsqueeze(1)
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.vocab_size :] = 0
        for logits, label, scale, out in _chunks(logits_TV, label_T1, scale_T1, grad_TV):
            probability = logits[:, : ctx.vocab_size].float().softmax(-1)
            probability.scatter_add_(1, label, probability.new_full((), -1.0).expand(label.shape))
            torch.mul(probability, scale, out=out[:, : ctx.vocab_size])
        return grad_TV, None, None, None


class _ParallelCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_TV: Tensor, label_T: Tensor, counted_T: Tensor, vocab_size: int, tensor: TensorRanks
    ) -> Tensor:
        first = tensor.index * logits_TV.shape[1]
        ctx.columns = columns = min(max(vocab_size - first, 0), logits_TV.shape[1])
        label_T1 = (label_T.where(counted_T, -1) - first).unsqueeze(1)
        owned_T1 = (label_T1 >= 0) & (label_T1 < columns)
        label_T1 = label_T1.where(owned_T1, 0)

        # Of each row: its largest logit, the sum of exponentials relative to it, the label's logit.
        statistics_3T1 = torch.zeros(3, *label_T1.shape, dtype=torch.float32, device=logits_TV.device)
        statistics_3T1[0] = -torch.inf
        if columns:  # a rank may have nothing but padding
            for logits, label, highest, total, chosen in _chunks(logits_TV, label_T1, *statistics_3T1):
                logits = logits[:, :columns].float()
                torch.amax(logits, 1, keepdim=True, out=highest)
                torch.sum((logits - highest).exp_(), 1, keepdim=True, out=total)
                torch.gather(logits, 1, label, out=chosen)
        statistics_3T1[2].masked_fill_(~owned_T1, 0.0)
        highest_RT1, total_RT1, chosen_RT1 = tensor.stack(statistics_3T1).unbind(1)
        highest_T1 = highest_RT1.amax(0)
        total_T1 = (total_RT1 * (highest_RT1 - highest_T1).exp_()).sum(0)
        ctx.save_for_backward(logits_TV, label_T1, owned_T1, counted_T, highest_T1, total_T1)
        log_probability_T1 = chosen_RT1.sum(0) - highest_T1 - total_T1.log()
        return -log_probability_T1.squeeze(1).where(counted_T, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, label_T1, owned_T1, counted_T, highest_T1, total_T1 = ctx.saved_tensors
        columns = ctx.columns
        minus_one_T1 = -owned_T1.float()
        scale_T1 = (counted_T * grad).unsqueeze(1)
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, columns:] = 0
        rows = (logits_TV, label_T1, minus_one_T1, highest_T1, total_T1, scale_T1, grad_TV)
        for logits, label, minus_one, highest, total, scale, out in _chunks(*rows) if columns else ():
            probability = (logits[:, :columns].float() - highest).exp_().div_(total)
            probability.scatter_add_(1, label, minus_one)
            torch.mul(probability, scale, out=out[:, :columns])
        return grad_TV, None, None, None, None


def _chunks(logits_TV: Tensor, *others: Tensor) -> zip:
    """Some rows at a time of logits and of other tensors with as many rows."""
    rows = max(1, CHUNK_ELEMENTS // logits_TV.shape[1])
    return zip(*(x.split(rows) for x in (logits_TV, *others)))
