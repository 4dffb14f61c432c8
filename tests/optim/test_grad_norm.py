"""The pieces of the global gradient norm against exact arithmetic."""

import math
import random
from fractions import Fraction

import pytest
import torch

from megatron_ds.optim.grad_norm import CHUNK, ROW, clip_coefficient, global_norm, sum_of_squares


def exact(tensor):
    """Sum of squares as a rational number, rounded once."""
    return float(sum(Fraction(value) ** 2 for value in tensor.double().flatten().tolist()))


@pytest.mark.parametrize("numel", [0, 1, 7, ROW - 1, ROW, ROW + 1, 3 * ROW + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares_is_exact_to_float64(numel, dtype):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    total = sum_of_squares(tensor)
    assert total.dtype is torch.float64
    assert total.shape == ()
    assert total.item() == pytest.approx(exact(tensor), rel=1e-14)


def test_sum_of_squares_over_several_chunks_and_views():
    tensor = torch.randn(2 * CHUNK + 3 * ROW + 11, generator=torch.Generator().manual_seed(0))
    assert sum_of_squares(tensor).item() == pytest.approx(tensor.double().square().sum().item(), rel=1e-13)
    transposed = tensor[: 300 * 40].view(300, 40).t()
    assert sum_of_squares(transposed).item() == pytest.approx(exact(transposed), rel=1e-14)


def test_sum_of_squares_neither_overflows_nor_underflows_in_float32():
    assert sum_of_squares(torch.tensor([3e30, 4e30])).item() == pytest.approx(25e60, rel=1e-6)
    assert sum_of_squares(torch.full((ROW,), 1e-30)).item() == pytest.approx(ROW * 1e-60, rel=1e-6)


def test_sum_of_squares_does_not_depend_on_the_number_of_threads():
    tensor = torch.randn(CHUNK + 5 * ROW + 3, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        totals = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            totals.append(sum_of_squares(tensor).item())
    finally:
        torch.set_num_threads(before)
    assert totals[0] == totals[1]


def test_sum_of_squares_does_not_keep_the_graph():
    assert not sum_of_squares(torch.ones(3, requires_grad=True)).requires_grad


def test_global_norm_does_not_depend_on_the_order():
    rng = random.Random(0)
    squares = {f"layers.{i}.weight": 10 ** rng.uniform(-12, 12) for i in range(500)}
    norms = set()
    for _ in range(20):
        names = list(squares)
        rng.shuffle(names)
        norms.add(global_norm({name: squares[name] for name in names}))
    assert len(norms) == 1
    want = math.sqrt(float(sum(Fraction(value) for value in squares.values())))
    assert norms == {want}


def test_global_norm_of_a_split_model_equals_that_of_the_whole():
    tensors = {f"w{i}": torch.randn(50 + i, generator=torch.Generator().manual_seed(i)) for i in range(9)}
    squares = {name: sum_of_squares(tensor).item() for name, tensor in tensors.items()}
    whole = torch.cat([tensor.double() for tensor in tensors.values()]).norm().item()
    assert global_norm(squares) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    squares = {"good": 1.0, "bad": sum_of_squares(torch.tensor([1.0, bad])).item()}
    assert not math.isfinite(global_norm(squares))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0])
def test_clip_coefficient_is_pytorchs(max_norm):
    parameters = [torch.nn.Parameter(torch.zeros(9)), torch.nn.Parameter(torch.zeros(4, 3))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    grads = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    for parameter, grad in zip(parameters, grads):
        torch.testing.assert_close(parameter.grad, grad * clip_coefficient(norm, max_norm), rtol=1e-6, atol=0)


def test_clip_coefficient_never_enlarges_and_zero_turns_it_off():
    assert clip_coefficient(0.0, 1.0) == 1.0
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
    assert clip_coefficient(4.0, 0.0) == 1.0
