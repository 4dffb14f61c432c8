"""Ranks that share every matrix: the regions they compute together, and the ways in and out of them.

Inside a region each rank has some heads, or some columns of the feed-forward block, and the outputs are partial sums.
``enter`` and ``leave`` are the borders; between regions activations are whole on every rank, or, under sequence
parallelism, each rank has its own stretch of the sequence (arXiv 1909.08053, 2205.05198). What a backward pass needs is
the adjoint: the gradient of what all ranks read is the sum over the ranks.

A parameter that every rank holds whole has a gradient that is whole, too, unless the ranks used it for different tokens
or different heads: then it is tagged as ``partial``. So is, without a tag, that of a part which several ranks hold
(``Shard.copies``). ``sum_gradients`` makes up for both after the backward passes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ds.parallel.shard import Shard, shards_of

SEQUENCE = 1
"""Dimension of the sequence in x_BSD."""

BUCKET_ELEMENTS = 2**25
"""Gradients that ``sum_gradients`` sends in one message."""


@dataclass(frozen=True)
class TensorRanks:
    """This rank among those that share its matrices."""

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def splits_sequence(self) -> bool:
        """Whether each rank has only its part of the sequence between regions."""
        return self.size > 1 and self.sequence_parallel

    def share(self, whole: int, parts: int | None = None) -> int:
        """Size of this rank's part of ``whole`` rows, columns or heads; ``parts``: see ``shard``."""
        parts = parts or self.size
        assert whole % parts == 0, f"{whole} cannot be cut into {parts} parts"
        return whole // parts

    def shard(self, parameter: nn.Parameter, dim: int, parts: int | None = None) -> nn.Parameter:
        """Tag a parameter that holds this rank's part along ``dim``; returns it.

        Args:
            parts: how many different ones there are, by default one per rank; of fewer, neighbours hold the same.
        """
        if self.size > 1:
            parts = parts or self.size
            assert self.size % parts == 0, f"{self.size} ranks cannot share {parts} parts"
            copies = self.size // parts
            Shard("tensor", dim, self.index // copies, parts, copies).attach(parameter)
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        """Into a region: x_BSD whole on every rank, from x_BSD, or from each rank's part under sequence parallelism."""
        ways = (_gather, _reduce_scatter) if self.sequence_parallel else (_as_it_is, _all_reduce)
        return self._pass(x, *ways)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a region: the sum of the ranks' partial x_BSD, whole or, under sequence parallelism, each its part."""
        ways = (_reduce_scatter, _gather) if self.sequence_parallel else (_all_reduce, _as_it_is)
        return self._pass(x, *ways)

    def split(self, x: Tensor) -> Tensor:
        """This rank's part of a sequence that all ranks have; the gradient is gathered."""
        return self._pass(x, _stretch, _gather)

    def join(self, x: Tensor) -> Tensor:
        """The whole sequence from the ranks' parts, for use by all in the same way: the gradient is split."""
        return self._pass(x, _gather, _stretch)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, for use by all in the same way: the gradient passes through."""
        return self._pass(x, _all_reduce, _as_it_is)

    def _pass(self, x: Tensor, there: "Way", back: "Way") -> Tensor:
        return x if self.size == 1 else _Pass.apply(x, self, there, back)

    def stretch(self, x: Tensor) -> Tensor:
        """View of this rank's part of a whole sequence; no gradient is gathered."""
        size = x.shape[SEQUENCE] // self.size
        return x.narrow(SEQUENCE, self.index * size, size)

    def stack(self, x: Tensor) -> Tensor:
        """Every rank's x, [size, *x.shape]; no gradient."""
        stacked = x.new_empty(self.size, *x.shape)
        dist.all_gather_single(stacked.view(-1), x.contiguous().view(-1), group=self.group)
        return stacked

    @torch.no_grad()
    def sum_gradients(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Complete, in place, the gradients of parameters for which ``needs_sum`` holds; others are left alone.

        Collective over the group.

        Args:
            pairs: parameters and their gradients; the same parameters in the same order on every rank.
        """
        if self.size == 1:
            return
        bucket, waiting = [], 0
        for parameter, gradient in pairs:
            if not needs_sum(parameter):
                continue
            if bucket and (waiting >= BUCKET_ELEMENTS or gradient.dtype != bucket[0][1].dtype):
                self._sum_bucket(bucket)
                bucket, waiting = [], 0
            bucket.append((parameter, gradient))
            waiting += gradient.numel()
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        """One message: of a part that neighbours hold, all the different ones, of which this rank fills its own."""
        parts = [_part(parameter) for parameter, _ in pairs]
        gradients = [gradient for _, gradient in pairs]
        sizes = [count * gradient.numel() for (_, count), gradient in zip(parts, gradients)]
        flat = gradients[0].new_zeros(sum(sizes))
        views = [
            whole.view(count, -1)[index].view_as(gradient)
            for whole, (index, count), gradient in zip(flat.split(sizes), parts, gradients)
        ]
        torch._foreach_copy_(views, gradients)
        dist.all_reduce(flat, group=self.group)
        torch._foreach_copy_(gradients, views)


ALONE = TensorRanks()


def mark_partial(module: nn.Module) -> nn.Module:
    """Tag all parameters of a module: each rank's gradient is only its part of a sum. Returns the module."""
    for parameter in module.parameters():
        parameter.partial = True
    return module


def is_partial(parameter: Tensor) -> bool:
    """Whether the gradient is the sum of those of all ranks."""
    return getattr(parameter, "partial", False)


def needs_sum(parameter: Tensor) -> bool:
    """Whether a rank's gradient is not complete: it is partial, or neighbours hold the same part of the weight."""
    return is_partial(parameter) or any(shard.copies > 1 for shard in _tensor_shards(parameter))


def _part(parameter: Tensor) -> tuple[int, int]:
    """Which of how many different parts of a weight this is."""
    shards = _tensor_shards(parameter)
    assert not (shards and is_partial(parameter)), "what is partial is whole on every rank"
    return (shards[0].index, shards[0].count) if shards else (0, 1)


def _tensor_shards(parameter: Tensor) -> list[Shard]:
    return [shard for shard in shards_of(parameter) if shard.axis == "tensor"]


class _Pass(torch.autograd.Function):
    """One way through the ranks for activations, another for gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: TensorRanks, there: "Way", back: "Way") -> Tensor:
        ctx.ranks, ctx.back = ranks, back
        return there(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.ranks), None, None, None


Way = Callable[[Tensor, TensorRanks], Tensor]


def _as_it_is(x: Tensor, ranks: TensorRanks) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, ranks: TensorRanks) -> Tensor:
    # A copy, since autograd and the caller may hold x for other uses.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def _gather(x: Tensor, ranks: TensorRanks) -> Tensor:
    """The ranks' parts, one behind the other along the sequence; a single sample is not copied again."""
    return ranks.stack(x).movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)


def _reduce_scatter(x: Tensor, ranks: TensorRanks) -> Tensor:
    """This rank's part of the sum over the ranks; a single sample is not copied before."""
    parts = x.unflatten(SEQUENCE, (ranks.size, -1)).movedim(SEQUENCE, 0).contiguous()
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter_single(mine.view(-1), parts.view(-1), group=ranks.group)
    return mine


def _stretch(x: Tensor, ranks: TensorRanks) -> Tensor:
    return ranks.stretch(x).contiguous()
