"""Our ``PipelineEngine``: DeepSpeed's optimizer, ZeRO-1 and gradient reduction under our own instruction stream.

A step interprets the program that ``pipeline/lowering.py`` made of an order table: computes, and the messages between
them, which are posted early and awaited when used. Each receive has a tensor of its own, so any order is safe. What a
sample is made of (document ids, positions, labels) does not travel: ranks that share a data index read the same data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import GradientsMixin
from megatron_ds.engine.module import StageModule
from megatron_ds.model.context import Context
from megatron_ds.parallel.deferred import Queue, deferring
from megatron_ds.parallel.p2p import Letter, Mailbox
from megatron_ds.pipeline.lowering import Instruction, Transfer, lower
from megatron_ds.pipeline.schedule import Compute, Schedule, forward_only


class TableEngine(GradientsMixin, PipelineEngine):
    """Runs any order table. One instance per rank; all ranks call its methods together."""

    module: StageModule

    def __init__(self, *args, schedule: Schedule, **kwargs):
        self._chunk: int | None = None
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        self._mailbox = Mailbox(self.groups)
        self._reserve_pipe_buffers(1)
        if self.module.shared_embedding is not None:
            self.separate_late_gradients(self.module.shared_embedding)

    def train_step(
        self, batches: list[Batch], *, num_counted: int, step: int, mtp_weight: float = 0.0, bias_rate: float = 0.0
    ) -> Tensor:
        """One optimizer step.

        Args:
            batches: this data rank's micro-batches of the global batch; their number may change from step to step.
            num_counted: counted tokens of the whole global batch.
            step: number of steps taken before.
            mtp_weight: factor on the MTP loss.
            bias_rate: step of the routers' balancing biases.

        Returns:
            float64 [2]: sums of the main and of the MTP loss over this rank's counted tokens; zero unless
            ``computes_loss``.
        """
        self.module.train()
        scale = self.groups.topology.data / max(num_counted, 1)
        sums = _Run(self, batches, step, scale, mtp_weight).execute(self._program(len(batches), training=True))
        self.complete_gradients()
        self._exec_reduce_tied_grads()
        self._exec_reduce_grads()
        self._exec_optimizer_step()
        self.finish_experts(bias_rate)
        return sums

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """float64 sum of the main loss over these batches, zero unless ``computes_loss``; changes nothing."""
        self.module.eval()
        return _Run(self, batches).execute(self._program(len(batches), training=False))[0]

    @property
    def computes_loss(self) -> bool:
        """Whether losses that this rank returns count: it has the end of the model, and is the first tensor rank."""
        return any(map(self.module.is_last, range(len(self.module.chunks)))) and self.groups.index("tensor") == 0

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the activations between stages: that of the weights."""
        return next(self.module.parameters()).dtype

    def activation_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Shape of the activations between stages: this tensor rank's part of x_BSD."""
        batch_size, length = batch.token_BS.shape
        tensor = self.groups.tensor
        return batch_size, length // (tensor.size if tensor.splits_sequence else 1), self.model_config.hidden_size

    def _program(self, num_micro_batches: int, *, training: bool) -> list[Instruction]:
        sizes = self.num_stages, num_micro_batches, len(self.module.chunks)
        return _programs(self.schedule, *sizes, training)[self.stage_id]

    @contextmanager
    def at(self, chunk: int) -> Iterator[None]:
        """Be the stage of a chunk, for DeepSpeed's hooks."""
        self._chunk = chunk
        try:
            yield
        finally:
            self._chunk = None

    def is_first_stage(self) -> bool:
        """Whether the chunk that is run begins the model; between runs, the place in the pipeline."""
        return super().is_first_stage() if self._chunk is None else self.module.is_first(self._chunk)

    def is_last_stage(self) -> bool:
        """Whether the chunk that is run ends the model; between runs, the place in the pipeline."""
        return super().is_last_stage() if self._chunk is None else self.module.is_last(self._chunk)

    def stage_forward(self, *inputs, **kwargs) -> Tensor:
        """Forward of a chunk with DeepSpeed's hooks (``PipelineEngine.forward`` itself is disabled)."""
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


@lru_cache(maxsize=8)
def _programs(
    schedule: Schedule, num_ranks: int, num_micro_batches: int, num_chunks: int, training: bool
) -> list[list[Instruction]]:
    """Programs of all ranks; kept, since every step wants the same few and ordering them takes milliseconds."""
    order = schedule.tables if training else partial(forward_only, placement=schedule.placement)
    return lower(order(num_ranks, num_micro_batches, num_chunks), num_chunks, schedule.placement)


@dataclass
class InFlight:
    """What a chunk holds of a micro-batch between its forward and its backward pass."""

    input: Tensor
    output: Tensor
    """x_BSD; of the last virtual stage the loss, scaled."""


Place = tuple[int, int]
"""Chunk and micro-batch."""


class _Run:
    """One pass over a program: the state of the micro-batches under way. ``step`` is None in an evaluation."""

    def __init__(
        self, engine: TableEngine, batches: list[Batch], step: int | None = None, scale: float = 0.0, mtp: float = 0.0
    ):
        self.engine, self.batches, self.step, self.scale, self.mtp_weight = engine, batches, step, scale, mtp
        self.training = step is not None
        self.mailbox, self.activation_dtype = engine._mailbox, engine.activation_dtype
        self.contexts: dict[int, Context] = {}
        self.activations: dict[Place, Letter] = {}
        self.gradients: dict[Place, Letter] = {}
        self.in_flight: dict[Place, InFlight] = {}
        self.waiting: dict[Place, Queue] = {}
        self.sums = torch.zeros(2, dtype=torch.float64, device=engine.groups.device)

    def execute(self, program: list[Instruction]) -> Tensor:
        """Run every instruction; returns the sums of both losses."""
        for instruction in program:
            getattr(self, instruction.kind)(instruction)
        self.mailbox.drain()
        return self.sums

    def forward(self, compute: Compute) -> None:
        engine, batch, place = self.engine, self.batches[compute.micro_batch], (compute.chunk, compute.micro_batch)
        with engine.at(compute.chunk):
            if engine.is_first_stage():
                x = batch.token_BS
            else:
                x = self.activations.pop(place).open().requires_grad_(self.training)
            output = engine.stage_forward(x, self._context(compute), chunk=compute.chunk)
            if engine.is_last_stage():
                losses = engine.objective(output, batch)
                if engine.computes_loss:
                    self.sums += engine.sums(losses)
                output = losses.total(self.mtp_weight) * self.scale
        if self.training or not engine.module.is_last(compute.chunk):
            self.in_flight[place] = InFlight(x, output)

    def _context(self, compute: Compute) -> Context:
        """What all layers of a micro-batch share: made for its first chunk here, kept until the last."""
        engine, index = self.engine, compute.micro_batch
        if compute.chunk == 0:
            batch = self.batches[index]
            progress = engine.progress(self.step, index, self.batches) if self.training else {}
            self.contexts[index] = Context.build(engine.model_config, batch.document_BS, batch.position_BS, **progress)
        last = compute.chunk == len(engine.module.chunks) - 1
        return self.contexts.pop(index) if last else self.contexts[index]

    def backward(self, compute: Compute) -> None:
        place = compute.chunk, compute.micro_batch
        held = self.in_flight[place]
        with self.engine.at(compute.chunk):
            if self.engine.is_last_stage():
                self.engine.loss_backward(held.output)
            else:
                self.engine.stage_backward(held.output, self.gradients.pop(place).open())
            if self.engine.is_first_stage():
                del self.in_flight[place]

    def backward_input(self, compute: Compute) -> None:
        with deferring() as queue:
            self.backward(compute)
        self.waiting[compute.chunk, compute.micro_batch] = queue

    def backward_weight(self, compute: Compute) -> None:
        with self.engine.adding_gradients():
            for add in self.waiting.pop((compute.chunk, compute.micro_batch)):
                add()

    def hand_activation(self, transfer: Transfer) -> None:
        self.activations[transfer.peer_chunk, transfer.micro_batch] = Letter(None, self._take_output(transfer))

    def hand_gradient(self, transfer: Transfer) -> None:
        self.gradients[transfer.peer_chunk, transfer.micro_batch] = Letter(None, self._take_gradient(transfer))

    def send_activation(self, transfer: Transfer) -> None:
        self.mailbox.send(self._take_output(transfer), transfer.peer)

    def recv_activation(self, transfer: Transfer) -> None:
        self.activations[transfer.chunk, transfer.micro_batch] = self._receive(transfer)

    def send_gradient(self, transfer: Transfer) -> None:
        self.mailbox.send(self._take_gradient(transfer), transfer.peer)

    def recv_gradient(self, transfer: Transfer) -> None:
        self.gradients[transfer.chunk, transfer.micro_batch] = self._receive(transfer)

    def _receive(self, transfer: Transfer) -> Letter:
        shape = self.engine.activation_shape(self.batches[transfer.micro_batch])
        return self.mailbox.receive(shape, self.activation_dtype, transfer.peer)

    def _take_output(self, transfer: Transfer) -> Tensor:
        place = transfer.chunk, transfer.micro_batch
        return (self.in_flight[place] if self.training else self.in_flight.pop(place)).output.detach()

    def _take_gradient(self, transfer: Transfer) -> Tensor:
        return self.in_flight.pop((transfer.chunk, transfer.micro_batch)).input.grad
