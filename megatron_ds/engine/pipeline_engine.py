"""Our ``PipelineEngine``: DeepSpeed's optimizer, ZeRO-1 and gradient reduction under our own instruction stream.

A step interprets the program that ``pipeline/lowering.py`` made of an order table: computes, and the messages between
them, which are posted early and awaited when used. Each receive has a tensor of its own, so any order is safe. The
activation carries the packing of its sample (document ids and positions) to every stage.
"""

from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import GradientsMixin
from megatron_ds.parallel.p2p import Letter, Mailbox
from megatron_ds.pipeline.lowering import Instruction, lower
from megatron_ds.pipeline.schedule import SCHEDULES, Compute, forward_only, tables


@dataclass
class InFlight:
    """What a stage holds of a micro-batch between its forward and its backward pass."""

    input: Tensor
    packing: Tensor
    """document_BS and position_BS stacked: [2, B, S] int64."""
    output: Tensor
    """x_BSD; on the last stage the loss sum."""


class TableEngine(GradientsMixin, PipelineEngine):
    """Runs any order table. One instance per rank; all ranks call its methods together."""

    def __init__(self, *args, schedule: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = SCHEDULES[schedule]
        self._mailbox = Mailbox(self.groups)
        self._reserve_pipe_buffers(1)

    def train_step(self, batches: list[Batch], *, num_counted: int, step: int) -> Tensor:
        """One optimizer step.

        Args:
            batches: this data rank's micro-batches of the global batch.
            num_counted: counted tokens of the whole global batch.
            step: number of steps taken before.

        Returns:
            float64 loss sum over this rank's counted tokens; zero except on the last stage.
        """
        self.module.train()
        run = _Run(self, batches, step, scale=self.groups.topology.data / max(num_counted, 1))
        loss = run.execute(self._program(self.schedule, len(batches)))
        self._exec_reduce_tied_grads()
        self._exec_reduce_grads()
        self._exec_optimizer_step()
        self.finish_experts()
        return loss

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """float64 loss sum over these batches on the last stage, zero on the others; changes nothing."""
        self.module.eval()
        return _Run(self, batches, step=None, scale=0.0).execute(self._program(forward_only, len(batches)))

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the activations between stages: that of the weights."""
        return next(self.module.parameters()).dtype

    def _program(self, schedule, num_micro_batches: int) -> list[Instruction]:
        return lower(tables(schedule, self.num_stages, num_micro_batches))[self.stage_id]

    def stage_forward(self, *inputs, **kwargs) -> Tensor:
        """Forward of this stage with DeepSpeed's hooks (``PipelineEngine.forward`` itself is disabled)."""
        return DeepSpeedEngine.forward(self, *inputs, **kwargs)

    def loss_backward(self, loss: Tensor) -> None:
        """Backward from the loss, with DeepSpeed's loss scaling but without its division by the micro-batches."""
        DeepSpeedEngine.backward(self, loss, scale_wrt_gas=False)

    def stage_backward(self, output: Tensor, gradient: Tensor) -> None:
        """Backward from a received gradient, as DeepSpeed does it (it accumulates into the fp32 buffers of bf16)."""
        self.pipe_buffers["outputs"][0] = output
        self.grad_layer = gradient
        PipelineEngine._exec_backward_pass(self, 0)
        self.grad_layer = None


class _Run:
    """One pass over a program: the state of the micro-batches under way. ``step`` is None in an evaluation."""

    def __init__(self, engine: TableEngine, batches: list[Batch], step: int | None, scale: float):
        self.engine, self.batches, self.step, self.scale = engine, batches, step, scale
        self.training = step is not None
        self.mailbox = engine._mailbox
        self.activations: dict[int, tuple[Letter, Letter]] = {}
        self.gradients: dict[int, Letter] = {}
        self.in_flight: dict[int, InFlight] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=engine.groups.device)

    def execute(self, program: list[Instruction]) -> Tensor:
        """Run every instruction; returns the loss sum."""
        for instruction in program:
            if isinstance(instruction, Compute):
                getattr(self, instruction.kind)(instruction.micro_batch)
            else:
                getattr(self, instruction.kind)(instruction.micro_batch, instruction.peer)
        self.mailbox.drain()
        return self.loss

    def forward(self, index: int) -> None:
        engine, batch = self.engine, self.batches[index]
        if engine.is_first_stage():
            x, packing = batch.token_BS, torch.stack([batch.document_BS, batch.position_BS])
        else:
            x, packing = (letter.open() for letter in self.activations.pop(index))
            x.requires_grad_(self.training)
        progress = engine.progress(self.step, index, len(self.batches)) if self.training else {}
        output = engine.stage_forward(x, *packing, **progress)
        if engine.is_last_stage():
            output = engine.objective(output, batch)
            self.loss += output.detach()
            if not self.training:
                return
        self.in_flight[index] = InFlight(x, packing, output)

    def backward(self, index: int) -> None:
        held = self.in_flight[index]
        if self.engine.is_last_stage():
            self.engine.loss_backward(held.output * self.scale)
        else:
            self.engine.stage_backward(held.output, self.gradients.pop(index).open())
        if self.engine.is_first_stage():
            del self.in_flight[index]

    def send_activation(self, index: int, peer: int) -> None:
        held = self.in_flight[index] if self.training else self.in_flight.pop(index)
        self.mailbox.send("activation", held.output, peer)
        self.mailbox.send("activation", held.packing, peer)

    def recv_activation(self, index: int, peer: int) -> None:
        batch_size, length = self.batches[index].token_BS.shape
        shape = (batch_size, length, self.engine.module.model_config.hidden_size)
        self.activations[index] = (
            self.mailbox.receive("activation", shape, self.engine.activation_dtype, peer),
            self.mailbox.receive("activation", (2, batch_size, length), torch.int64, peer),
        )

    def send_gradient(self, index: int, peer: int) -> None:
        self.mailbox.send("gradient", self.in_flight.pop(index).input.grad, peer)

    def recv_gradient(self, index: int, peer: int) -> None:
        output = self.in_flight[index].output
        self.gradients[index] = self.mailbox.receive("gradient", output.shape, output.dtype, peer)
