"""RMSNorm as one autograd node: fewer passes over memory than the composed form, and only the input is kept.

The order is Hugging Face's: normalise in fp32, cast to the input's dtype, multiply by the weight. Fused library kernels
multiply before the cast, which changes a quarter of all bf16 outputs by one unit in the last place.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.parallel.tensor import ALONE, TensorRanks, mark_partial


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis; ``weight`` is [size]."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.epsilon)


class FinalNorm(RMSNorm):
    """The norm before the output layer, called like every other layer of the model: x_BSD, context -> x_BSD."""

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE):
        super().__init__(config.hidden_size, config.norm_epsilon)
        if tensor.splits_sequence:
            mark_partial(self)

    def forward(self, x_BSD: Tensor, context: object) -> Tensor:
        return super().forward(x_BSD)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).float()
        inverse_rms_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        inverse_rms_N1.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms_N1)
        y_ND = (x_ND * inverse_rms_N1).to(x.dtype)
        return y_ND.mul_(weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms_N1 = ctx.saved_tensors
        size = x.shape[-1]
        grad_ND = grad.reshape(-1, size).float()
        unit_ND = x.reshape(-1, size).float() * inverse_rms_N1
        product_ND = grad_ND * unit_ND
        grad_weight = product_ND.sum(0)
        # d loss / dx = (grad * weight - unit * mean(grad * weight * unit)) / rms
        mean_N1 = (product_ND @ weight.float()).div_(size).unsqueeze_(-1)
        grad_x_ND = torch.mul(grad_ND, weight, out=product_ND)
        grad_x_ND.sub_(unit_ND.mul_(mean_N1)).mul_(inverse_rms_N1)
        return grad_x_ND.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), None
