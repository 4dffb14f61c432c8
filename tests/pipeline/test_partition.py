"""Which layers a virtual stage holds: optimal against every possible cut, and as a layout says."""

from itertools import combinations, pairwise

import pytest

from megatron_ds.pipeline.partition import partition, stage_bounds


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_partition_is_contiguous_and_optimal(num_stages):
    costs = [3.0, 1.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    bounds = partition(costs, num_stages)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == num_stages + 1
    assert all(a < b for a, b in pairwise(bounds))

    def worst(cuts):
        return max(sum(costs[a:b]) for a, b in pairwise(cuts))

    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_stages - 1)]
    assert worst(bounds) == min(map(worst, every))


def test_equal_layers_are_shared_evenly():
    assert partition([1.0] * 8, 4) == [0, 2, 4, 6, 8]


def test_what_comes_first_and_last_counts():
    # Embedding, six equal layers, norm and output: the ends get fewer layers.
    costs = [3.0, *[1.0] * 6, 0.0, 3.0]
    assert stage_bounds(costs, 6, 3) == [0, 2, 6, 9]
    assert stage_bounds([0.0, *[1.0] * 6, 0.0, 0.0], 6, 3) == [0, 3, 5, 9]
    assert stage_bounds(costs, 6, 1) == [0, 9]
    assert stage_bounds(costs, 6, 6) == [0, 2, 3, 4, 5, 6, 9]


def test_costlier_layers_take_more_room():
    dense, experts = 1.0, 3.0
    assert stage_bounds([0.0, *[dense] * 3, *[experts] * 3, 0.0, 0.0], 6, 2) == [0, 5, 9]


def test_a_layout_is_followed_also_with_empty_stages():
    costs = [1.0] * 9
    assert stage_bounds(costs, 6, 4, (1, 2, 2, 1)) == [0, 2, 4, 6, 9]
    assert stage_bounds(costs, 6, 4, (0, 3, 3, 0)) == [0, 1, 4, 7, 9]
    assert stage_bounds(costs, 6, 4, (3, 0, 0, 3)) == [0, 4, 4, 4, 9]


@pytest.mark.parametrize("layout", [(1, 2, 3), (1, 2, 2, 2), (3, 3, 0), (6,)])
def test_a_layout_that_does_not_fit_is_never_cut_to_size(layout):
    with pytest.raises(AssertionError):
        stage_bounds([1.0] * 9, 6, 4, layout)
