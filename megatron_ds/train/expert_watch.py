"""Warnings about experts: one line when a trouble has lasted, one when it is over.

Two things go wrong with a router: an expert receives nothing (*dead*), or a layer sends too much to one expert. One
step proves neither, and every router is unbalanced at first, so a trouble counts only after ``dead_expert_steps``
steps in a row, and its end is the first step without it. The memory is the process's: a resumed run counts anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_ds.config.schema import MonitorConfig
from megatron_ds.train.expert_load import layer_figures

if TYPE_CHECKING:  # a dense run needs nothing of it
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

MOST_NAMED = 8
"""Experts of a layer that a message names; the others are counted."""


@dataclass
class Streaks:
    """How long each of many conditions has held without a break, and which of them became or ceased to be a trouble."""

    patience: int
    """Steps in a row that make a trouble."""
    _length: Tensor | int = 0

    def add(self, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one step; bool masks of the shape of ``bad``: those that are a trouble now, and those no longer."""
        ended = ~bad & torch.as_tensor(self._length >= self.patience)
        self._length = (self._length + 1) * bad
        return self._length == self.patience, ended


class ExpertWatch:
    """Says when experts die, when a layer is out of balance, and when that is over."""

    def __init__(self, monitor: MonitorConfig, say: Callable[[str], None]) -> None:
        self._patience, self._limit, self._say = monitor.dead_expert_steps, monitor.max_expert_imbalance, say
        self._dead = Streaks(self._patience)
        self._unbalanced = Streaks(self._patience)

    def step(self, step: int, load: "ExpertLoad") -> None:
        """Take in one step."""
        figures = layer_figures(load)
        fix = f"raise {'--moe-router-bias-update-rate' if load.bias_LE is not None else '--moe-aux-loss-coeff'}"
        died_LE, revived_LE = self._dead.add(load.chosen_LE == 0)
        began_L, ended_L = self._unbalanced.add(figures.max_over_mean_L > self._limit)
        for row, layer in enumerate(load.layers):
            place, largest = f"step {step}: layer {layer}:", f"{figures.max_over_mean_L[row]:.1f}"
            if died_LE[row].any():
                self._say(f"{place} {_named(died_LE[row])} received nothing for {self._patience} steps; {fix}")
            if revived_LE[row].any():
                self._say(f"{place} {_named(revived_LE[row])} received tokens again")
            if began_L[row]:
                busiest = int(figures.load_factor_LE[row].argmax())
                self._say(
                    f"{place} the busiest expert had more than {self._limit:g} times the mean load for "
                    f"{self._patience} steps (expert {busiest} now has {largest}); {fix}"
                )
            if ended_L[row]:
                self._say(f"{place} the busiest expert is back at {largest} times the mean load")


def _named(mask_E: Tensor) -> str:
    """expert 3; experts 1, 4, 7; experts 0, 1, 2, 3, 4, 5, 6, 7 and 56 more."""
    numbers = mask_E.nonzero().flatten().tolist()
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"expert{'s' if len(numbers) > 1 else ''} {shown}{more}"
