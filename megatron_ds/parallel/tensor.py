"""Ranks that share every matrix: the regions they compute together, and the ways in and out of them.

Inside a region each rank has some heads, or some columns of the feed-forward block, and the outputs are partial sums.
``enter`` and ``leave`` are the borders; between regions activations are whole on every rank, or, under sequence
parallelism, each rank has its own stretch of the sequence (arXiv 1909.08053, 2205.05198). What a backward pass needs is
the adjoint: the gradient of what all ranks read is the sum over the ranks.

A parameter that every rank holds whole has a gradient that is whole, too, unless the ranks used it for different tokens
or different heads: then it is tagged as ``partial``, and the engine sums it over the ranks after the backward passes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SEQUENCE = 1
"""Dimension of the sequence in x_BSD."""


@dataclass(frozen=True)
class TensorRanks:
    """This rank among those that share its matrices."""

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """Into a region: x_BSD whole on every rank, from x_BSD, or from each rank's part under sequence parallelism."""
        if self.size == 1:
            return x
        return (_Gather if self.sequence_parallel else _Copy).apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a region: the sum of the ranks' partial x_BSD, whole or, under sequence parallelism, each its part."""
        if self.size == 1:
            return x
        return (_Scatter if self.sequence_parallel else _Sum).apply(x, self)

    def split(self, x: Tensor) -> Tensor:
        """This rank's part of a sequence that all ranks have; the gradient is gathered."""
        return x if self.size == 1 else _Split.apply(x, self)

    def join(self, x: Tensor) -> Tensor:
        """The whole sequence from the ranks' parts, for use by all in the same way: the gradient is split."""
        return x if self.size == 1 else _Join.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, for use by all in the same way: the gradient passes through."""
        return x if self.size == 1 else _Sum.apply(x, self)

    @property
    def splits_sequence(self) -> bool:
        """Whether each rank has only its part of the sequence between regions."""
        return self.size > 1 and self.sequence_parallel


ALONE = TensorRanks()


def mark_partial(module: nn.Module) -> nn.Module:
    """Tag all parameters of a module: each rank's gradient is only its part of a sum. Returns the module."""
    for parameter in module.parameters():
        parameter.partial = True
    return module


def is_partial(parameter: Tensor) -> bool:
    """Whether the gradient has to be summed over the tensor-parallel ranks."""
    return getattr(parameter, "partial", False)


def _all_reduce(x: Tensor, ranks: TensorRanks) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def _gather(x: Tensor, ranks: TensorRanks) -> Tensor:
    """The ranks' parts, one behind the other along the sequence."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
    dist.all_gather(parts, x.contiguous(), group=ranks.group)
    return torch.cat(parts, SEQUENCE)


def _part(x: Tensor, ranks: TensorRanks) -> Tensor:
    return x.chunk(ranks.size, SEQUENCE)[ranks.index].contiguous()


def _reduce_scatter(x: Tensor, ranks: TensorRanks) -> Tensor:
    """This rank's part of the sum over the ranks."""
    parts = torch.stack(x.chunk(ranks.size, SEQUENCE))
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(mine, parts, group=ranks.group)
    return mine


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.ranks), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        return _all_reduce(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return _gather(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.ranks), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return _reduce_scatter(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.ranks), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return _part(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.ranks), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return _gather(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _part(grad, ctx.ranks), None
