"""Which layers each pipeline stage holds: contiguous ranges with the smallest possible maximum cost, or as told."""

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: list[float], num_stages: int) -> list[int]:
    """Cut a chain of layers into contiguous stages so that the most expensive stage is as cheap as possible.

    Among the cuts with the same maximum the earliest boundaries win, so the result is deterministic.

    Args:
        costs: cost of each layer (any unit); layers are never split.
        num_stages: number of stages, at most ``len(costs)``.

    Returns:
        ``num_stages + 1`` boundaries: stage s holds layers ``[bounds[s], bounds[s + 1])``, none empty.
    """
    num_layers = len(costs)
    assert 1 <= num_stages <= num_layers, (num_stages, num_layers)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    # best[s][i]: smallest maximum when the first i layers form s stages; cut[s][i]: where the last of them begins.
    best = [[float("inf")] * (num_layers + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, num_stages + 1):
        for stop in range(stage, num_layers + 1):
            for start in range(stage - 1, stop):
                worst = max(best[stage - 1][start], total[stop] - total[start])
                if worst < best[stage][stop]:
                    best[stage][stop], cut[stage][stop] = worst, start

    bounds = [num_layers]
    for stage in range(num_stages, 0, -1):
        bounds.append(cut[stage][bounds[-1]])
    return bounds[::-1]


def stage_bounds(
    costs: list[float], num_layers: int, num_stages: int, layout: Sequence[int] | None = None
) -> list[int]:
    """Boundaries of the virtual stages in the layer list.

    The cut runs over the decoder layers; the embedding goes with the first virtual stage, and all that follows the
    decoder layers (norm, MTP, output) with the last.

    Args:
        costs: of every entry of the layer list: embedding, ``num_layers`` decoder layers, the others.
        num_layers: decoder layers.
        num_stages: virtual stages.
        layout: decoder layers of every virtual stage, which must sum to ``num_layers``; by default the cut that makes
            the most expensive stage cheapest, at least one decoder layer in each.
    """
    layers = costs[1 : num_layers + 1]
    layers[0] += costs[0]
    layers[-1] += sum(costs[num_layers + 1 :])
    inner = list(accumulate(layout)) if layout is not None else partition(layers, num_stages)[1:]
    assert len(inner) == num_stages and inner[-1] == num_layers, (layout, num_stages, num_layers)
    return [0, *(1 + layer for layer in inner[:-1]), len(costs)]
