"""Topology arithmetic against a plain grid, and the groups that are made from it on real ranks."""

import itertools

import pytest
import torch
from ranks import RankError, run_ranks

from megatron_ds.parallel.topology import Topology

GRIDS = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2), (4, 2, 1), (2, 8, 2), (3, 5, 7)]


@pytest.mark.parametrize(("pipe", "data", "tensor"), GRIDS)
def test_ranks_are_a_grid_with_tensor_fastest(pipe, data, tensor):
    topology = Topology(pipe, data, tensor)
    grid = list(itertools.product(range(pipe), range(data), range(tensor)))
    assert topology.world_size == len(grid)
    for rank, (p, d, t) in enumerate(grid):
        assert [topology.coordinate(rank, axis) for axis in ("pipe", "data", "tensor")] == [p, d, t]
        assert topology.rank_at(pipe=p, data=d, tensor=t) == rank
        assert topology.peers(rank, "data") == [topology.rank_at(pipe=p, data=k, tensor=t) for k in range(data)]


def test_topologies_coexist():
    small, large = Topology(1, 2, 1), Topology.of_world(8, pipe=2, tensor=2)
    assert (small.world_size, large.data) == (2, 2)


def sums(groups):
    """Each rank adds its own power of two along each axis; agree and gather see everyone."""
    value = torch.tensor([2.0**groups.rank])
    return {
        "pipe": groups.sum_over("pipe", value.clone()).item(),
        "data": groups.sum_over("data", value.clone()).item(),
        "world": groups.sum_over_world(value.clone()).item(),
        "gather": groups.gather_objects(groups.rank),
        "agree": groups.agree(f"from {groups.rank}"),
        "last": groups.is_last_stage,
    }


@pytest.mark.parametrize(("size", "pipe"), [(1, 1), (2, 2), (4, 2), (4, 1), (8, 4)])
def test_groups_sum_along_their_axis(size, pipe):
    topology = Topology.of_world(size, pipe=pipe, tensor=1)
    results = run_ranks(sums, size, parallel={"pipeline_model_parallel_size": pipe})
    for rank, result in enumerate(results):
        for axis in ("pipe", "data"):
            assert result[axis] == sum(2.0**peer for peer in topology.peers(rank, axis))
        assert result["world"] == 2.0**size - 1
        assert result["gather"] == list(range(size))
        assert result["agree"] == "from 0"
        assert result["last"] == (topology.coordinate(rank, "pipe") == pipe - 1)


def fail_on_rank_one(groups):
    if groups.rank == 1:
        raise ValueError("broken on purpose")


def test_a_failing_rank_is_reported_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 1:(.|\n)*broken on purpose"):
        run_ranks(fail_on_rank_one, 2)
    assert run_ranks(sums, 2)[1]["world"] == 3.0  # the pool recovers
