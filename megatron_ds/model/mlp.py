"""The feed-forward block: SwiGLU, down(silu(gate(x)) * up(x)).

The activation is one autograd node that keeps the two projections and recomputes silu in the backward pass, so no
tensor of width F is stored that can be made from another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ds.model.context import Context
from megatron_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.parallel.tensor import ALONE, TensorRanks


class MLP(nn.Module):
    """SwiGLU feed-forward block: x_BSD -> x_BSD. F is this rank's part of the width."""

    def __init__(self, hidden_size: int, ffn_size: int, tensor: TensorRanks = ALONE):
        super().__init__()
        self.tensor = tensor
        self.gate = ColumnParallelLinear(hidden_size, ffn_size, tensor)
        self.up = ColumnParallelLinear(hidden_size, ffn_size, tensor)
        self.down = RowParallelLinear(ffn_size, hidden_size, tensor)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """The context is what other feed-forward blocks need; here it is not looked at."""
        x_BSD = self.tensor.enter(x_BSD)
        return self.tensor.leave(self.down(_SwiGLU.apply(self.gate(x_BSD), self.up(x_BSD))))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BSF, up_BSF)
        return F.silu(gate_BSF).mul_(up_BSF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSF: Tensor) -> tuple[Tensor, Tensor]:
        gate_BSF, up_BSF = ctx.saved_tensors
        grad_up_BSF = F.silu(gate_BSF).mul_(grad_BSF)
        return torch.ops.aten.silu_backward(grad_BSF * up_BSF, gate_BSF), grad_up_BSF
