"""Linear layers, most without a bias; in fp32 on a CPU their products go through oneDNN.

PyTorch hands fp32 products to the BLAS it was built with and only the lower precisions to oneDNN, although oneDNN has
fp32 kernels too. On an AMD core those are 6 to 20 % faster than the BLAS at the sizes of a decoder layer. They are
reached through the operator that PyTorch's own compiler emits; where it is missing, and for any other device or dtype,
everything falls to ``torch.nn.functional.linear``. Either way the weight gradient may wait (``deferred.py``); a bias is
added within the product, before it is rounded to the output's dtype.

Tensor-parallel ranks cut a weight by its output rows (column-parallel, after the paper's x A) or by its input columns
(row-parallel). Neither communicates: a block enters and leaves the region once for all of its linear layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

from megatron_ds.parallel.deferred import weight_gradients
from megatron_ds.parallel.tensor import ALONE, TensorRanks

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

if ONEDNN_LINEAR is not None and ONEDNN_LINEAR not in flop_registry:

    @register_flop_formula(ONEDNN_LINEAR)
    def _linear_flop(x_shape, weight_shape, *args, **kwargs) -> int:
        return mm_flop((x_shape.numel() // x_shape[-1], x_shape[-1]), weight_shape[::-1])


class Linear(nn.Linear):
    """y = x weight^T (+ bias); ``weight`` is [out_features, in_features], ``bias``, if there is one, [out_features]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    """The outputs of this rank: whole inputs -> its part of the output features."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensor: TensorRanks = ALONE,
        parts: int | None = None,
        *,
        bias: bool = False,
    ):
        """``out_features``: of the whole layer; ``parts``: see ``TensorRanks.shard``. A bias is cut like the rows."""
        super().__init__(in_features, tensor.share(out_features, parts), bias=bias)
        for parameter in self.parameters():
            tensor.shard(parameter, 0, parts)


class RowParallelLinear(Linear):
    """A term of the sum over the ranks: this rank's part of the input features -> all outputs."""

    def __init__(self, in_features: int, out_features: int, tensor: TensorRanks = ALONE):
        """``in_features``: of the whole layer."""
        super().__init__(tensor.share(in_features), out_features)
        tensor.shard(self.weight, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] and bias [out] -> x weight^T (+ bias) [..., out]."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # what was saved comes back as an alias under activation recompute, without its ``.grad``
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, grad_bias
        (grad_weight,) = weight_gradients([ctx.weight], lambda: [grad.flatten(0, -2).t() @ x.flatten(0, -2)])
        return grad_x, grad_weight, grad_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if ONEDNN_LINEAR is not None and x.is_cpu and x.dtype == weight.dtype == torch.float32:
        return ONEDNN_LINEAR(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
