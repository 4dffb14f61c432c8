"""The load of the experts in numbers: the metrics of a step, and the record of every expert that the ledger keeps.

The *load* of an expert is how many assignments (token, expert) the router made to it in one global batch; its load
factor lambda is load / mean load of the layer, so that 1 everywhere is balance. *Rows* are the assignments that found
a slot. The record is an ``ExpertLoad`` as plain JSON and reads back exactly: table, picture and metrics can be made
from the ledger alone. Pure arithmetic; warnings are in ``expert_watch.py``, the picture in ``expert_heatmap.py``.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ds.train.metrics import Value

if TYPE_CHECKING:  # a dense run needs nothing of it
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad


@dataclass(frozen=True)
class LayerFigures:
    """What follows from an ``ExpertLoad`` for each of its L layers. A layer that saw no token has zeros."""

    load_factor_LE: Tensor
    """lambda; sums to E over a layer."""
    max_over_mean_L: Tensor
    """lambda of the busiest expert, 1 to E."""
    load_cv_L: Tensor
    """Coefficient of variation of the load: standard deviation / mean."""
    entropy_L: Tensor
    """Entropy of the shares of the load, divided by log E: 1 in balance, 0 when one expert gets everything."""
    dead_L: Tensor
    """int64: experts that received nothing in this step."""
    dropped_share_L: Tensor
    """Share of the assignments that found no slot, 0 to 1."""
    rank_max_over_mean_L: Tensor
    """Rows of the busiest expert-parallel rank / mean over ranks, 1 to ranks."""


def layer_figures(load: "ExpertLoad") -> LayerFigures:
    """Work out the figures of every layer, in float64."""
    num_layers, num_experts = load.chosen_LE.shape
    chosen_LE = load.chosen_LE.double()
    load_factor_LE = _over_mean(chosen_LE)
    share_LE = load_factor_LE / num_experts
    entropy_L = torch.special.entr(share_LE).sum(dim=1)
    rows_LR = (load.chosen_LE - load.dropped_LE).double().view(num_layers, load.ranks, -1).sum(dim=2)
    return LayerFigures(
        load_factor_LE=load_factor_LE,
        max_over_mean_L=load_factor_LE.amax(dim=1),
        load_cv_L=load_factor_LE.std(dim=1, correction=0),
        entropy_L=entropy_L / math.log(max(num_experts, 2)),
        dead_L=(load.chosen_LE == 0).sum(dim=1),
        dropped_share_L=load.dropped_LE.sum(dim=1) / chosen_LE.sum(dim=1).clamp_min(1),
        rank_max_over_mean_L=_over_mean(rows_LR).amax(dim=1),
    )


def _over_mean(x_LN: Tensor) -> Tensor:
    """Each value relative to the mean of its row; zeros in a row of zeros."""
    mean_L1 = x_LN.mean(dim=1, keepdim=True)
    return x_LN / mean_L1.where(mean_L1 > 0, 1.0)


def expert_metrics(load: "ExpertLoad") -> dict[str, Value]:
    """The metrics of a step (docs/monitoring.md), one value for all layers together."""
    layer = layer_figures(load)
    assignments = int(load.chosen_LE.sum())
    metrics: dict[str, Value] = {
        "moe/assignments": assignments,
        "moe/load_cv": float(layer.load_cv_L.mean()),
        "moe/max_over_mean": float(layer.max_over_mean_L.max()),
        "moe/max_over_mean_layer_mean": float(layer.max_over_mean_L.mean()),
        "moe/entropy": float(layer.entropy_L.min()),
        "moe/entropy_layer_mean": float(layer.entropy_L.mean()),
        "moe/dead_experts": int(layer.dead_L.sum()),
        "moe/dropped_pct": 100 * int(load.dropped_LE.sum()) / max(assignments, 1),
        "moe/rank_max_over_mean": float(layer.rank_max_over_mean_L.max()),
        "moe/bytes_sent": int(load.bytes_sent_L.sum()),
        "moe/exchange_s": float(load.seconds_L.sum()),
        "moe/exposed_s": float(load.exposed_seconds_L.sum()),
        "moe/aux_loss": float(load.auxiliary_loss_L.sum()),
    }
    if load.bias_LE is not None:
        metrics |= {"moe/bias_min": float(load.bias_LE.min()), "moe/bias_max": float(load.bias_LE.max())}
    return metrics


def to_record(load: "ExpertLoad") -> dict[str, Any]:
    """Every expert of every layer, as the ledger keeps it under ``experts``: nested lists, layer first."""
    return {
        "layers": list(load.layers),
        "ranks": load.ranks,
        "load": load.chosen_LE.tolist(),
        "dropped": load.dropped_LE.tolist(),
        "bias": None if load.bias_LE is None else load.bias_LE.tolist(),
        "bytes_sent": load.bytes_sent_L.tolist(),
        "exchange_s": load.seconds_L.tolist(),
        "exposed_s": load.exposed_seconds_L.tolist(),
        "aux_loss": load.auxiliary_loss_L.tolist(),
    }


def from_record(record: dict[str, Any]) -> "ExpertLoad":
    """Inverse of ``to_record``."""
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

    return ExpertLoad(
        layers=tuple(record["layers"]),
        chosen_LE=torch.tensor(record["load"], dtype=torch.int64),
        dropped_LE=torch.tensor(record["dropped"], dtype=torch.int64),
        bias_LE=None if record["bias"] is None else torch.tensor(record["bias"], dtype=torch.float32),
        ranks=record["ranks"],
        bytes_sent_L=torch.tensor(record["bytes_sent"], dtype=torch.float64),
        seconds_L=torch.tensor(record["exchange_s"], dtype=torch.float64),
        exposed_seconds_L=torch.tensor(record["exposed_s"], dtype=torch.float64),
        auxiliary_loss_L=torch.tensor(record["aux_loss"], dtype=torch.float64),
    )
