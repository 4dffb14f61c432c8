"""What our two engines share: loss normalisation, the exact global gradient norm, and tied weights.

The loss is a *sum* over counted tokens and is divided once, by the count of the whole global batch. DeepSpeed averages
gradients over the data axis, so the factor is ``data_parallel_size / count``, and its division by the number of
micro-batches is left out; no micro-batching, masking or rank count then changes the gradient.

The norm counts every weight once, and combines the weights' sums of squares with ``math.fsum``, whose result does not
depend on the order: all pipeline layouts clip by the same bits.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.data.loader import Batch
from megatron_ds.model.moe.sparse_mlp import ExpertLoad, finish_step
from megatron_ds.optim.grad_norm import clip_coefficient, global_norm, sum_of_squares
from megatron_ds.parallel.groups import Groups
from megatron_ds.parallel.random import micro_batch_seed

Objective = Callable[[Tensor, Batch], Tensor]
"""logits_BSV and the batch to the *sum* of the loss over counted tokens."""


class GlobalNorm:
    """The global gradient norm over every layout of weights: each rank knows some parts, all ranks get the result."""

    def __init__(self, groups: Groups, weight_names: list[str], parameters: dict[str, nn.Parameter]):
        """``weight_names``: all weights of the model, in the same order on every rank."""
        self._groups = groups
        self._slot = {name: index for index, name in enumerate(weight_names)}
        self._name = {id(parameter): name for name, parameter in parameters.items()}

    def __call__(self, parts: Iterable[tuple[nn.Parameter, Tensor]], *, sharded: bool) -> float:
        """Norm of the gradients whose parts this rank holds.

        Args:
            parts: parameters and (parts of) their gradients. Copies of a tied weight are left out here.
            sharded: the parts of the data ranks differ (ZeRO), instead of being the same.
        """
        squares = torch.zeros(len(self._slot), dtype=torch.float64, device=self._groups.device)
        for parameter, gradient in parts:
            replicated = getattr(parameter, "ds_pipe_replicated", False) or not (sharded or self._counts(parameter))
            name = self._name.get(id(parameter))  # the anchor of a stage without experts has none
            if name is not None and not replicated:
                squares[self._slot[name]] += sum_of_squares(gradient)
        if sharded or self._groups.experts is not None:
            self._groups.sum_over("data", squares)
        self._groups.sum_over("pipe", squares)  # one non-zero term per slot, so the sum is exact
        return global_norm(dict(zip(self._slot, squares.tolist())))

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether the sum over the data ranks, if there is one, takes this whole gradient from this rank."""
        return self._groups.experts is None or self._groups.holds_first_copy(parameter)


class GradientsMixin:
    """Mixed into a ``DeepSpeedEngine`` subclass; see the module docstring."""

    global_norm: GlobalNorm
    expert_load: ExpertLoad | None = None
    """What the experts did in the last step; None without experts."""

    def __init__(
        self,
        *args,
        groups: Groups,
        objective: Objective,
        seed: int,
        model_config: ModelConfig,
        moe: MoEConfig | None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.groups, self.objective, self.seed = groups, objective, seed
        self.model_config, self.moe = model_config, moe

    def dropout_seed(self, step: int, index: int) -> int:
        """Seed of the dropout masks of this data rank's micro-batch ``index``."""
        return micro_batch_seed(self.seed, step, index * self.groups.topology.data + self.groups.index("data"))

    def progress(self, step: int, index: int, num_micro_batches: int) -> dict[str, Any]:
        """What the layers are told about micro-batch ``index`` of a training step, see ``Context.build``."""
        return {
            "step": step,
            "dropout_seed": self.dropout_seed(step, index),
            "micro_batch": index,
            "auxiliary_scale": self.current_loss_scale / num_micro_batches,
        }

    def finish_experts(self) -> None:
        """Balance the experts by the load of the step that was just taken."""
        if self.moe is not None:
            self.expert_load = finish_step(self.module, self.moe, self.model_config.num_layers, self.groups)

    def install_global_norm(self, weight_names: list[str], parameters: dict[str, nn.Parameter]) -> None:
        """Make DeepSpeed's ZeRO wrappers clip by our norm; bf16 with ZeRO-1 keeps DeepSpeed's (its BF16_Optimizer)."""
        self.global_norm = GlobalNorm(self.groups, weight_names, parameters)
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            self.optimizer.scaled_global_norm = lambda: self._zero_norm(self.optimizer.params_in_partition)
        elif isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.optimizer._get_norm_groups = lambda: [self._zero_norm(self.optimizer.fp16_groups)]

    def _zero_norm(self, parameters_of_group: list[list[nn.Parameter]]) -> Tensor:
        """Norm over this rank's gradient shards, still multiplied by the loss scale as the wrappers expect.

        float64, so that the clipping factor has the same bits with every wrapper and without one.
        """
        parts = [
            (parameter, gradient)
            for index, parameters in enumerate(parameters_of_group)
            for parameter, gradient in zip(
                parameters,
                (g for g in self.optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)),
            )
        ]
        return torch.tensor(self.global_norm(parts, sharded=True), dtype=torch.float64, device=self.groups.device)

    def _take_model_step(self, lr_kwargs: dict | None) -> None:
        """DeepSpeed's step; without a ZeRO wrapper the norm and the clipping are ours."""
        if isinstance(self.optimizer, torch.optim.Optimizer):
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            self._global_grad_norm = self.global_norm([(p, p.grad) for p in parameters], sharded=False)
            coefficient = clip_coefficient(self._global_grad_norm, self.gradient_clipping())
            if coefficient < 1:
                torch._foreach_mul_([p.grad for p in parameters], coefficient)
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        """Done in ``_take_model_step``; DeepSpeed's version counts only the first pipeline stage."""

    def set_learning_rate(self, value: float) -> None:
        """Learning rate of every parameter group for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; infinite when the step was skipped."""
        return float(self._global_grad_norm)

    @property
    def current_loss_scale(self) -> float:
        """Factor on the fp16 loss; 1 in other precisions."""
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if self.fp16_enabled() else 1.0

    @property
    def was_skipped(self) -> bool:
        """Whether the last step left the weights as they were because a gradient overflowed."""
        return not self._step_applied

    @property
    def device_peak_bytes(self) -> int | None:
        """Most memory allocated on this rank's accelerator; None on a CPU, which keeps no such count."""
        accelerator = get_accelerator()
        return None if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()
