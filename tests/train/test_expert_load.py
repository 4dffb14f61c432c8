"""Figures, metrics and records of the experts, against plain loops over Python numbers."""

import json
import math
import random
import statistics

import pytest
import torch
from expert_loads import expert_load

from megatron_ds.train.expert_load import expert_metrics, from_record, layer_figures, to_record
from megatron_ds.train.ledger import Ledger, read


def random_load(num_layers, num_experts, ranks, seed):
    generator = random.Random(seed)
    chosen = [[generator.choice((0, 1, 7, 100)) for _ in range(num_experts)] for _ in range(num_layers)]
    dropped = [[generator.randint(0, count) for count in row] for row in chosen]
    bias = [[generator.uniform(-1, 1) for _ in range(num_experts)] for _ in range(num_layers)]
    return expert_load(chosen, dropped, bias, ranks=ranks)


def expected(load, row):
    """The figures of one layer, the slow way."""
    chosen, dropped = load.chosen_LE[row].tolist(), load.dropped_LE[row].tolist()
    total, size = sum(chosen), len(chosen)
    local = size // load.ranks
    rows = [a - b for a, b in zip(chosen, dropped)]
    per_rank = [sum(rows[rank * local : (rank + 1) * local]) for rank in range(load.ranks)]
    shares = [count / total for count in chosen if count] if total else []
    return {
        "load_factor_LE": [count / (total / size) if total else 0.0 for count in chosen],
        "max_over_mean_L": max(chosen) / (total / size) if total else 0.0,
        "load_cv_L": statistics.pstdev(chosen) / (total / size) if total else 0.0,
        "entropy_L": -sum(p * math.log(p) for p in shares) / math.log(size) if size > 1 else 0.0,
        "dead_L": chosen.count(0),
        "dropped_share_L": sum(dropped) / total if total else 0.0,
        "rank_max_over_mean_L": max(per_rank) / (sum(per_rank) / load.ranks) if sum(per_rank) else 0.0,
    }


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "ranks"), [(1, 1, 1), (3, 2, 1), (5, 7, 1), (4, 8, 4), (2, 64, 8), (3, 6, 6)]
)
def test_figures_equal_a_plain_loop(num_layers, num_experts, ranks):
    load = random_load(num_layers, num_experts, ranks, seed=num_experts)
    load.chosen_LE[0], load.dropped_LE[0] = 0, 0  # a layer without a token
    figures = layer_figures(load)
    for row in range(num_layers):
        for name, value in expected(load, row).items():
            assert getattr(figures, name)[row].tolist() == pytest.approx(value, abs=1e-12), (row, name)


def test_load_factors_sum_to_the_number_of_experts():
    load = random_load(6, 48, 4, seed=0)
    assert layer_figures(load).load_factor_LE.sum(dim=1).tolist() == pytest.approx([48.0] * 6)


@pytest.mark.parametrize(
    ("chosen", "max_over_mean", "cv", "entropy"),
    [([5, 5, 5, 5], 1.0, 0.0, 1.0), ([20, 0, 0, 0], 4.0, math.sqrt(3), 0.0), ([10, 10, 0, 0], 2.0, 1.0, 0.5)],
)
def test_figures_of_balance_and_of_its_opposite(chosen, max_over_mean, cv, entropy):
    metrics = expert_metrics(expert_load([chosen]))
    assert metrics["moe/max_over_mean"] == pytest.approx(max_over_mean)
    assert metrics["moe/load_cv"] == pytest.approx(cv)
    assert metrics["moe/entropy"] == pytest.approx(entropy)


def test_metrics_take_the_worst_layer_the_mean_or_the_sum():
    load = expert_load(
        [[5, 5, 5, 5], [10, 10, 0, 0]],
        dropped=[[1, 0, 0, 0], [0, 1, 0, 0]],
        bias=[[0.0, 0.25, -0.5, 0.0], [0.0, 0.0, 0.75, 0.0]],
        ranks=2,
    )
    assert expert_metrics(load) == pytest.approx(
        {
            "moe/assignments": 40,
            "moe/load_cv": 0.5,
            "moe/max_over_mean": 2.0,
            "moe/max_over_mean_layer_mean": 1.5,
            "moe/entropy": 0.5,
            "moe/entropy_layer_mean": 0.75,
            "moe/dead_experts": 2,
            "moe/dropped_pct": 5.0,
            "moe/rank_max_over_mean": 2.0,
            "moe/bytes_sent": 3_000_000,
            "moe/exchange_s": 0.3,
            "moe/exposed_s": 0.03,
            "moe/aux_loss": 1.5,
            "moe/bias_min": -0.5,
            "moe/bias_max": 0.75,
        }
    )


def test_a_router_without_a_bias_has_no_bias_metrics():
    assert not [name for name in expert_metrics(expert_load([[1, 2]])) if "bias" in name]


def test_a_step_that_routed_nothing_has_finite_metrics():
    metrics = expert_metrics(expert_load([[0, 0, 0]], bias=[[0.0, 0.0, 0.0]]))
    assert all(math.isfinite(value) for value in metrics.values())
    assert (metrics["moe/assignments"], metrics["moe/dead_experts"], metrics["moe/dropped_pct"]) == (0, 3, 0.0)


def test_assignments_stay_exact_beyond_the_precision_of_floats():
    large = 2**53 + 1
    assert expert_metrics(expert_load([[large, 0]]))["moe/assignments"] == large


def test_a_record_comes_back_from_the_ledger_exactly(tmp_path):
    load = random_load(3, 5, 1, seed=1)
    load.bias_LE[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    ledger = Ledger(tmp_path / "l")
    ledger.append({"kind": "step", "step": 1, "experts": to_record(load)})
    ledger.close()
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    json.loads((tmp_path / "l").read_text(), **refuse)
    again = from_record(read(tmp_path / "l")[0]["experts"])
    assert (again.layers, again.ranks) == (load.layers, load.ranks)
    for name in (
        "chosen_LE",
        "dropped_LE",
        "bias_LE",
        "bytes_sent_L",
        "seconds_L",
        "exposed_seconds_L",
        "auxiliary_loss_L",
    ):
        torch.testing.assert_close(getattr(again, name), getattr(load, name), rtol=0, atol=0, equal_nan=True)
    assert from_record(to_record(expert_load([[1, 2]]))).bias_LE is None
