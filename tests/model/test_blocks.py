"""The autograd nodes of norm, feed-forward block and linear layer against composed operations."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_ds.model.mlp import MLP
from megatron_ds.model.norm import RMSNorm
from megatron_ds.parallel.linear import ONEDNN_LINEAR, Linear, linear


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(module, function, x, tolerance=1e-5):
    """Output and gradients of a module against a function of (x, weights) in double precision."""
    x = x.requires_grad_()
    weights = dict(module.named_parameters())
    exact = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    exact_x = x.detach().double().requires_grad_()
    y, expected = module(x), function(exact_x, exact)
    scale = draw(*y.shape, seed=1)
    got = torch.autograd.grad((y * scale).sum(), [x, *weights.values()])
    want = torch.autograd.grad((expected * scale).sum(), [exact_x, *exact.values()])
    for a, b in zip([y, *got], [expected, *want]):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 3, 64)])
def test_rms_norm(shape):
    norm = RMSNorm(shape[-1], 1e-3)
    norm.weight.data = draw(shape[-1], seed=2)
    compare(norm, lambda x, w: reference.rms_norm(x, w["weight"], 1e-3), draw(*shape))


def test_rms_norm_rounds_before_the_weight():
    x, norm = draw(512, 64).bfloat16(), RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data = draw(64, seed=1).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    agree = norm(x) == norm.weight * unit.bfloat16()
    assert agree.float().mean() > 0.999  # the mean is summed in another order, which can move a rounding
    assert (norm(x) == (norm.weight.float() * unit).bfloat16()).float().mean() < 0.9


def test_swiglu_block():
    mlp = MLP(24, 40)

    def plain(x, w):
        return (F.silu(x @ w["gate.weight"].T) * (x @ w["up.weight"].T)) @ w["down.weight"].T

    compare(mlp, plain, draw(2, 5, 24))


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 8), (70, 8)])
def test_linear(shape):
    compare(Linear(8, 5), lambda x, w: x @ w["weight"].T, draw(*shape))
    compare(Linear(8, 5, bias=True), lambda x, w: x @ w["weight"].T + w["bias"], draw(*shape))


@pytest.mark.parametrize("strided", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x.expand(4, -1, -1)])
def test_linear_takes_any_strides(strided):
    layer, x = Linear(8, 5), draw(1, 6, 8).requires_grad_()
    y = layer(strided(x))
    torch.testing.assert_close(y, F.linear(strided(x), layer.weight), rtol=1e-5, atol=1e-6)
    [got] = torch.autograd.grad(y.sum(), x)  # the gradient of a sum has no strides of its own
    [want] = torch.autograd.grad(F.linear(strided(x), layer.weight).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_skips_gradients_that_nobody_wants(dtype):
    x, weight = draw(6, 8).to(dtype), draw(5, 8, seed=1).to(dtype)
    with FlopCounterMode(display=False) as frozen_input:
        linear(x, weight.clone().requires_grad_()).sum().backward()
    with FlopCounterMode(display=False) as frozen_weight:
        linear(x.clone().requires_grad_(), weight).sum().backward()
    assert frozen_input.get_total_flops() == frozen_weight.get_total_flops() == 2 * (2 * 6 * 8 * 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_low_precision(dtype):
    x, weight = draw(6, 8).to(dtype), draw(5, 8, seed=1).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_products_go_through_onednn_here():
    assert ONEDNN_LINEAR is not None, "this PyTorch has no oneDNN operator: linear layers use the BLAS"
