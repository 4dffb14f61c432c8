"""What our two engines share: loss normalisation, sums over tensor ranks, the exact global norm, and tied weights.

The loss is a *sum* over counted tokens and is divided once, by the count of the whole global batch. DeepSpeed averages
gradients over the data axis, so the factor is ``data_parallel_size / count``, and its division by the number of
micro-batches is left out; no micro-batching, masking or rank count then changes the gradient.

The norm counts every weight once, and combines the weights' sums of squares with ``math.fsum``, whose result does not
depend on the order: all pipeline layouts clip by the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.data.loader import Batch
from megatron_ds.model.moe.sparse_mlp import ExpertLoad, finish_step
from megatron_ds.model.mtp import Losses
from megatron_ds.model.vocabulary import Embedding
from megatron_ds.optim.grad_norm import clip_coefficient, global_norm, sum_of_squares
from megatron_ds.parallel.groups import Groups
from megatron_ds.parallel.random import micro_batch_seed
from megatron_ds.parallel.tensor import needs_sum

Objective = Callable[[Tensor, Batch], Losses]
"""This tensor rank's logits_BSV and the batch to *sums* of the losses over counted tokens."""


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
        groups = self._groups
        squares = torch.zeros(len(self._slot), dtype=torch.float64, device=groups.device)
        among_data = groups.experts is not None and not sharded
        for parameter, gradient in parts:
            name = self._name.get(id(parameter))  # the anchor of a stage without experts has none
            copy = getattr(parameter, "ds_pipe_replicated", False)
            if name is not None and not copy and groups.holds_first_copy(parameter, of_data=among_data):
                squares[self._slot[name]] += sum_of_squares(gradient)
        if sharded or among_data:
            groups.sum_over("data", squares)
        groups.sum_over("tensor", squares)
        groups.sum_over("pipe", squares)  # one non-zero term per slot, so the sum is exact
        return global_norm(dict(zip(self._slot, squares.tolist())))


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
        self._separated: list[Embedding] = []  # a list, since a module that is an attribute would be a submodule

    def dropout_seed(self, step: int, index: int) -> int:
        """Seed of the dropout masks of this data rank's micro-batch ``index``."""
        return micro_batch_seed(self.seed, step, index * self.groups.topology.data + self.groups.index("data"))

    def progress(self, step: int, index: int, batches: list[Batch]) -> dict[str, Any]:
        """What the layers are told about micro-batch ``index`` of a training step, see ``Context.build``."""
        return {
            "step": step,
            "dropout_seed": self.dropout_seed(step, index),
            "micro_batch": index,
            "auxiliary_scale": self.current_loss_scale / len(batches),
            "next_token_BS": batches[index].label_BS if self.model_config.mtp_num_layers else None,
        }

    def sums(self, losses: Losses) -> Tensor:
        """float64 [2]: what a step reports of a micro-batch, the sums of the main and of the MTP loss."""
        mtp = torch.zeros_like(losses.main) if losses.mtp is None else losses.mtp
        return torch.stack([losses.main, mtp]).detach().double()

    def finish_experts(self, bias_rate: float) -> None:
        """Balance the experts by the load of the step that was just taken."""
        if self.moe is not None:
            self.expert_load = finish_step(self.module, self.model_config, self.moe, self.groups, bias_rate)

    def separate_late_gradients(self, embedding: Embedding) -> None:
        """Give the late uses of a tied embedding, at the end of the model, an alias whose gradient adds up by itself.

        A pipeline adds the gradients of both ends over all micro-batches, each on its own rank, before it sums them.
        Floats are not associative: only the same order on one rank gives the same bits. Low precision and ZeRO 2-3,
        which never promise these bits, let autograd sum the uses per micro-batch and save the second buffer.
        """
        if self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization_stage() >= 2:
            return
        self._separated.append(embedding)
        embedding.late_weight = embedding.weight.detach().requires_grad_()

    def complete_gradients(self) -> None:
        """After the last backward pass: add up what this rank kept apart, and what tensor ranks have parts of."""
        for embedding in self._separated:
            embedding.weight.grad += embedding.late_weight.grad
            embedding.late_weight.grad = None
        if self.groups.tensor.size > 1:
            parameters = [p for p in self.module.parameters() if needs_sum(p)]
            self.groups.tensor.sum_gradients((p, self._gradient(p)) for p in parameters)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient accumulated over the micro-batches of this step: in bf16 that is the optimizer's, in fp32."""
        if isinstance(self.optimizer, BF16_Optimizer):
            return parameter._hp_grad
        if parameter.grad is None:  # its peers may have one
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    @contextmanager
    def adding_gradients(self) -> Iterator[None]:
        """Around weight gradients that were deferred: in bf16 they are added to the fp32 sums, as after a backward."""
        bf16 = isinstance(self.optimizer, BF16_Optimizer)
        if bf16:
            self.optimizer.clear_lp_grads()
        yield
        if bf16:
            self.optimizer.update_hp_grads(clear_lp_grads=True)

    def install_global_norm(self, weight_names: list[str], parameters: dict[str, nn.Parameter]) -> None:
        """Clip by our norm, whatever wrapper DeepSpeed has chosen."""
        self.global_norm = GlobalNorm(self.groups, weight_names, parameters)
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            self.optimizer.scaled_global_norm = lambda: self._zero_norm(self.optimizer.params_in_partition)
        elif isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.optimizer._get_norm_groups = lambda: [self._zero_norm(self.optimizer.fp16_groups)]
        elif isinstance(self.optimizer, BF16_Optimizer):
            self.optimizer.clip_grad = 0.0

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
        """DeepSpeed's step. Where whole gradients are left to the optimizer, norm and clipping are done here."""
        bf16 = isinstance(self.optimizer, BF16_Optimizer)
        if not (bf16 or isinstance(self.optimizer, torch.optim.Optimizer)):
            super()._take_model_step(lr_kwargs)
            return
        gradients = {p: p._hp_grad if bf16 else p.grad for p in self.module.parameters() if bf16 or p.grad is not None}
        norm = self.global_norm(gradients.items(), sharded=False)
        coefficient = clip_coefficient(norm, self.gradient_clipping())
        if coefficient < 1:
            torch._foreach_mul_(list(gradients.values()), coefficient)
        super()._take_model_step(lr_kwargs)
        if not self.was_skipped:
            self._global_grad_norm = norm

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
