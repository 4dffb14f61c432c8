"""The feed-forward block: SwiGLU, down(silu(gate(x)) * up(x)).

The activation is one autograd node that keeps the two projections and recomputes silu in the backward pass, so no
tensor of width F is stored that can be made from another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ds.model.context import Context
from megatron_ds.parallel.linear import Linear


class MLP(nn.Module):
    """SwiGLU feed-forward block: x_BSD -> x_BSD."""

    def __init__(self, hidden_size: int, ffn_size: int):
        super().__init__()
        self.gate = Linear(hidden_size, ffn_size)
        self.up = Linear(hidden_size, ffn_size)
        self.down = Linear(ffn_size, hidden_size)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """The context is what other feed-forward blocks need; here it is not looked at."""
        return self.down(_SwiGLU.apply(self.gate(x_BSD), self.up(x_BSD)))


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
