"""Linear layers: the parts that ranks have, the bits of ``F.linear`` in low precision, and weight gradients that wait.

Values and FLOPs of a whole layer are in ``test_blocks.py``.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_ds.parallel.deferred import deferring, weight_gradients
from megatron_ds.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear, linear
from megatron_ds.parallel.shard import box_of, full_shape, shards_of
from megatron_ds.parallel.tensor import ALONE, TensorRanks

low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
any_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_column_parallel_weights():
    parts = [ColumnParallelLinear(5, 12, TensorRanks(index, 4)).weight for index in range(4)]
    assert all(part.shape == (3, 5) and full_shape(part) == (12, 5) for part in parts)
    assert [box_of(part) for part in parts] == [((3 * i, 3 * i + 3), (0, 5)) for i in range(4)]
    heads = [ColumnParallelLinear(5, 12, TensorRanks(index, 4), parts=2).weight for index in range(4)]
    assert [box_of(part)[0] for part in heads] == [(0, 6), (0, 6), (6, 12), (6, 12)]
    assert {shard.copies for part in heads for shard in shards_of(part)} == {2}


def test_column_parallel_biases_are_cut_like_the_rows():
    for parts in (None, 2):
        for index in range(4):
            layer = ColumnParallelLinear(5, 12, TensorRanks(index, 4), parts, bias=True)
            assert box_of(layer.bias) == box_of(layer.weight)[:1] and shards_of(layer.bias) == shards_of(layer.weight)


def test_row_parallel_weights():
    parts = [RowParallelLinear(12, 5, TensorRanks(index, 4)).weight for index in range(4)]
    assert all(part.shape == (5, 3) and full_shape(part) == (5, 12) for part in parts)
    assert [box_of(part)[1] for part in parts] == [(3 * i, 3 * i + 3) for i in range(4)]


def test_alone_they_are_whole():
    for layer in (ColumnParallelLinear(4, 6), RowParallelLinear(4, 6, ALONE)):
        assert layer.weight.shape == (6, 4) and not shards_of(layer.weight)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_make_the_whole(size):
    """Both kinds in a row, without ranks: concatenated outputs of the first, added outputs of the second."""
    x, first, second = draw(2, 7, 9), draw(8, 9, seed=1), draw(5, 8, seed=2)
    total = torch.zeros(2, 7, 5)
    for index in range(size):
        column = ColumnParallelLinear(9, 8, TensorRanks(index, size))
        row = RowParallelLinear(8, 5, TensorRanks(index, size))
        column.weight.data, row.weight.data = first.chunk(size)[index], second.chunk(size, 1)[index]
        total += row(column(x))
    torch.testing.assert_close(total, linear(linear(x, first), second), rtol=1e-5, atol=1e-5)


@low_precision
@pytest.mark.parametrize("shape", [(33, 24), (3, 11, 24), (2, 3, 5, 24), (1, 24)])
def test_low_precision_has_the_bits_of_the_library(dtype, shape):
    tensors = [
        draw(*size, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate((shape, (17, 24), (17,)))
    ]
    for used in (tensors[:2], tensors):
        ours, theirs = linear(*used), F.linear(*used)
        grad = draw(*theirs.shape, seed=3, dtype=dtype)
        assert torch.equal(ours, theirs)
        for got, want in zip(torch.autograd.grad(ours, used, grad), torch.autograd.grad(theirs, used, grad)):
            assert torch.equal(got, want)


def two_layers(dtype):
    layers = [Linear(6, 8).to(dtype), Linear(8, 6).to(dtype)]
    for seed, layer in enumerate(layers):
        layer.weight.data = draw(*layer.weight.shape, seed=seed, dtype=dtype)
    return layers


def backward_passes(layers, run, passes=2):
    """Gradient of each input; those of the weights add up in the layers."""
    inputs = []
    for seed in range(passes):
        x = draw(3, 5, 6, seed=10 + seed, dtype=layers[0].weight.dtype).requires_grad_()
        run(x).square().sum().backward()
        inputs.append(x.grad)
    return inputs


@any_precision
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_gradient_that_waits_is_the_same(dtype, recompute):
    def results(defer):
        first, second = layers = two_layers(dtype)
        run = lambda x: second(F.silu(first(x)))  # noqa: E731
        again = (lambda x: checkpoint(run, x, use_reentrant=False)) if recompute else run
        if not defer:
            return backward_passes(layers, again), [layer.weight.grad for layer in layers]
        with deferring() as queue:
            inputs = backward_passes(layers, again)
        assert [layer.weight.grad for layer in layers] == [None, None] and len(queue) == 4
        for compute in queue:
            compute()
        return inputs, [layer.weight.grad for layer in layers]

    (inputs, weights), (late_inputs, late_weights) = results(False), results(True)
    assert all(torch.equal(a, b) for a, b in zip([*inputs, *weights], [*late_inputs, *late_weights], strict=True))


def test_nothing_waits_for_a_frozen_weight():
    layer = Linear(6, 8)
    layer.weight.requires_grad_(False)
    with deferring() as queue:
        backward_passes([layer], layer)
    assert not queue and layer.weight.grad is None


def test_one_queue_at_a_time():
    with deferring(), pytest.raises(AssertionError, match="one backward pass"), deferring():
        pass
    weight = torch.zeros(2)
    assert weight_gradients([weight], lambda: ["now"]) == ["now"]  # and none is left behind
