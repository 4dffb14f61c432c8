"""The ways into and out of tensor-parallel regions against what they mean; completing gradients; dropout between."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from megatron_ds.parallel import tensor as tensor_module
from megatron_ds.parallel.random import dropout, seed_default_generator
from megatron_ds.parallel.shard import box_of, full_shape, shards_of
from megatron_ds.parallel.tensor import ALONE, is_partial, mark_partial, needs_sum

sizes = pytest.mark.parametrize("size", [2, 4])


def layout(size, sequence_parallel=False):
    return {"tensor_model_parallel_size": size, "sequence_parallel": sequence_parallel}


def of_all_ranks(size, *shape, dtype=torch.float32, seed=0):
    """One tensor of small integers, whose sums are exact in every dtype, per rank."""
    return torch.randint(-4, 5, (size, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def through(way, x, grad):
    """Output of a way for this rank's x, and the gradient of x for this rank's gradient of the output."""
    x = x.clone().requires_grad_()
    out = way(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def ways(groups, batch, dtype, strided):
    ranks = groups.tensor
    size, index, length = ranks.size, ranks.index, 3 * ranks.size
    whole = of_all_ranks(size, batch, length, 5, dtype=dtype)
    parts = of_all_ranks(size, batch, 3, 5, dtype=dtype, seed=1)
    if strided:
        whole, parts = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (whole, parts))
    joined = torch.cat(tuple(parts), 1)
    total = whole.sum(0)
    mine = slice(3 * index, 3 * index + 3)
    if ranks.sequence_parallel:
        results = {
            "enter": (through(ranks.enter, parts[index], whole[index]), (joined, total[:, mine])),
            "leave": (through(ranks.leave, whole[index], parts[index]), (total[:, mine], joined)),
        }
    else:
        results = {
            "enter": (through(ranks.enter, whole[index], whole[index]), (whole[index], total)),
            "leave": (through(ranks.leave, whole[index], whole[0]), (total, whole[0])),
        }
    results |= {
        "split": (through(ranks.split, whole[0], parts[index]), (whole[0][:, mine], joined)),
        "join": (through(ranks.join, parts[index], whole[0]), (joined, whole[0][:, mine])),
        "sum": (through(ranks.sum, whole[index], whole[0]), (total, whole[0])),
    }
    assert torch.equal(ranks.stack(parts[index]), parts)
    assert torch.equal(ranks.stretch(whole[0]), whole[0][:, mine])
    for way, (got, want) in results.items():
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), way


@sizes
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_way_and_its_adjoint(size, sequence_parallel):
    for batch, dtype, strided in [(1, torch.float32, False), (2, torch.float32, True), (2, torch.bfloat16, False)]:
        run_ranks(ways, size, batch, dtype, strided, parallel=layout(size, sequence_parallel))


def test_alone_there_is_no_way_to_go():
    x, parameter = torch.randn(2, 3, 4), nn.Parameter(torch.ones(3))
    assert all(way(x) is x for way in (ALONE.enter, ALONE.leave, ALONE.split, ALONE.join, ALONE.sum))
    assert ALONE.shard(parameter, 0) is parameter and not shards_of(parameter) and ALONE.share(5) == 5
    gradient = torch.ones(3)
    ALONE.sum_gradients([(mark_partial(nn.Linear(3, 1)).weight, gradient)])
    assert torch.equal(gradient, torch.ones(3))


def test_shares():
    """Heads that are fewer than ranks are each on several neighbours."""
    four = [tensor_module.TensorRanks(index, 4) for index in range(4)]
    assert [ranks.share(8) for ranks in four] == [2] * 4 and four[0].share(10, 2) == 5
    with pytest.raises(AssertionError, match="6 cannot be cut into 4 parts"):
        four[0].share(6)
    with pytest.raises(AssertionError, match="4 ranks cannot share 3 parts"):
        four[0].shard(nn.Parameter(torch.zeros(5, 3)), 0, 3)
    parameters = [ranks.shard(nn.Parameter(torch.zeros(5, 3)), 0, 2) for ranks in four]
    assert [box_of(p)[0] for p in parameters] == [(0, 5), (0, 5), (5, 10), (5, 10)]
    assert full_shape(parameters[0]) == (10, 3) and all(map(needs_sum, parameters))
    parameters = [ranks.shard(nn.Parameter(torch.zeros(5, 3)), 1) for ranks in four]
    assert [box_of(p)[1] for p in parameters] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert not any(map(needs_sum, parameters))


def complete(groups, bucket):
    """Gradients of every kind of parameter; what is mine is complete already and must stay."""
    ranks, size = groups.tensor, groups.tensor.size
    tensor_module.BUCKET_ELEMENTS = bucket
    norm, whole = mark_partial(nn.LayerNorm(7)), nn.Parameter(torch.empty(3))
    mine = ranks.shard(nn.Parameter(torch.empty(2, 5)), 0)
    shared = ranks.shard(nn.Parameter(torch.empty(2, 5)), 1, size // 2)
    everywhere = ranks.shard(nn.Parameter(torch.empty(3, 2)), 0, 1)
    parameters = [norm.weight, whole, shared, mine, norm.bias, everywhere]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    gradients = [
        of_all_ranks(size, *p.shape, dtype=dtype, seed=seed)
        for seed, (p, dtype) in enumerate(zip(parameters, dtypes))
    ]  # fmt: skip
    pair = ranks.index // 2 * 2
    want = [
        gradients[0].sum(0), gradients[1][ranks.index], gradients[2][pair : pair + 2].sum(0),
        gradients[3][ranks.index], gradients[4].sum(0), gradients[5].sum(0),
    ]  # fmt: skip
    got = [gradient[ranks.index].clone() for gradient in gradients]
    got[2] = got[2].t().contiguous().t()
    before = [gradient.data_ptr() for gradient in got]
    ranks.sum_gradients(iter(zip(parameters, got)))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert before == [gradient.data_ptr() for gradient in got]
    assert [needs_sum(p) for p in parameters] == [True, False, True, False, True, True]
    assert [is_partial(p) for p in parameters] == [True, False, False, False, True, False]


@sizes
@pytest.mark.parametrize("bucket", [1, 12, 2**25])
def test_gradients_are_completed_in_place(size, bucket):
    run_ranks(complete, size, bucket, parallel=layout(size))


def dropped(groups, x):
    seed_default_generator(x.device, 5)
    part = groups.tensor.stretch(x) if groups.tensor.splits_sequence else x
    part = part.clone().requires_grad_()
    first, second = (dropout(part, 0.3, groups.tensor) for _ in range(2))
    (first + 2 * second).sum().backward()
    return first.detach(), second.detach(), part.grad


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_one_process(size, dtype):
    x = torch.randn(2, 2 * size, 5).to(dtype)
    seed_default_generator(x.device, 5)
    whole = x.clone().requires_grad_()
    first, second = F.dropout(whole, 0.3), F.dropout(whole, 0.3)
    (first + 2 * second).sum().backward()
    want = [first.detach(), second.detach(), whole.grad]
    for result in run_ranks(dropped, size, x, parallel=layout(size)):
        assert all(torch.equal(a, b) for a, b in zip(result, want))
    stretches = run_ranks(dropped, size, x, parallel=layout(size, True))
    assert all(torch.equal(torch.cat(a, 1), b) for a, b in zip(zip(*stretches), want))
    assert not torch.equal(first == 0, second == 0)
