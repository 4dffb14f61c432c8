"""Which layers each pipeline stage holds: contiguous ranges with the smallest possible maximum cost."""


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
