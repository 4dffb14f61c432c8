"""Optimizers by name, and the parameter groups that every one of them gets.

The groups are always "decay", "no_decay" and then the distributed experts, if there are any, on every rank: DeepSpeed
reduces gradients and shards optimizer state group by group, and ranks whose groups differ would wait for each other for
ever. The learning rate of a step is written into the groups by the training loop (``lr_schedule.py``).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from megatron_ds.config.deepspeed_keys import OptimizerKeys, OptimizerParams

UNDECAYED_MODULES = frozenset({"far_gate"})
"""Modules whose matrices are not decayed: pulling a gate's weight to zero would make it ignore its input."""


def adamw(groups: list[dict[str, Any]], params: OptimizerParams, lr: float) -> Optimizer:
    """PyTorch's fused AdamW (decoupled weight decay, arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=lr, betas=params.betas, eps=params.eps, fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerParams, float], Optimizer]] = {"AdamW": adamw}


def is_decayed(name: str, parameter: Parameter) -> bool:
    """Whether weight decay applies: matrices (embeddings included) yes; norms, biases and gates no."""
    return parameter.ndim >= 2 and UNDECAYED_MODULES.isdisjoint(name.split("."))


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], optimizer: OptimizerKeys, lr: float
) -> Optimizer:
    """Build the optimizer over the trainable parameters of this rank.

    Args:
        named_parameters: ``module.named_parameters()``; frozen parameters are left out.
        optimizer: DeepSpeed's ``optimizer`` section.
        lr: Learning rate of the first step.

    Returns:
        An optimizer with the groups named "decay" and "no_decay", in this order, each in the order of the parameters.
        Parameters of distributed experts (which carry DeepSpeed's ``group_name``) are a decayed group of that name.
    """
    decayed: dict[bool, list[Parameter]] = {True: [], False: []}
    experts: dict[str, list[Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad and hasattr(parameter, "group_name"):
            experts.setdefault(parameter.group_name, []).append(parameter)
        elif parameter.requires_grad:
            decayed[is_decayed(name, parameter)].append(parameter)
    weight_decay = optimizer.params.weight_decay
    groups = [
        {"name": "decay", "params": decayed[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": decayed[False], "weight_decay": 0.0},
        *({"name": name, "params": own, "weight_decay": weight_decay, "moe": True} for name, own in experts.items()),
    ]
    for group in groups:
        assert group["params"], (
            f"parameter group {group['name']!r} is empty on this rank: every pipeline stage needs a matrix and a norm, "
            "since all ranks reduce the same groups in the same order"
        )
    return OPTIMIZERS[optimizer.type](groups, optimizer.params, lr)
