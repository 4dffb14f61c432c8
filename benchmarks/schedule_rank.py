"""One rank of the schedule benchmark: real engines over layers that sleep instead of computing.

Ours is ``TableEngine`` with a ``StageModule``, DeepSpeed's is what ``deepspeed.initialize`` makes of a stock
``PipelineModule``; both hold the same layers, one per chunk. A layer sleeps where it would compute, in the backward
pass once for the gradient of its input and once for that of its weight, which waits in a queue where the schedule wants
it to. So the processor is idle, and what a step takes beyond the sleeps is waiting and what the engines themselves do.

``schedule_processes.py`` starts this file and calls the functions of ``Rank`` by name.
"""

import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import repeat

import deepspeed
import network
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from schedule_work import Contestant, Work
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.data.loader import Batch
from megatron_ds.engine.module import StageModule
from megatron_ds.engine.pipeline_engine import TableEngine
from megatron_ds.model.decoder import LayerEntry
from megatron_ds.model.mtp import Losses
from megatron_ds.parallel.deferred import weight_gradients
from megatron_ds.parallel.groups import Groups, distributed
from megatron_ds.pipeline.schedule import SCHEDULES
from megatron_ds.pipeline.simulate import Durations

VOCABULARY = 8
LATE_SECONDS = 80e-6
"""How late a sleep ends on a quiet machine."""


def emulate(seconds: float) -> None:
    """Compute for so long. A sleep ends late, so it is cut short and the rest is waited for awake."""
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - LATE_SECONDS))
    while time.perf_counter() < end:
        pass


class Sleep(torch.autograd.Function):
    """y = x + weight, after as long as a stage needs for it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, durations: Durations) -> Tensor:
        ctx.weight, ctx.durations = weight, durations
        emulate(durations.forward)
        return x + weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, durations = ctx.weight, ctx.durations

        def compute() -> tuple[Tensor]:
            emulate(durations.backward_weight)
            return (gradient.sum().view(1),)

        emulate(durations.backward_input)
        return gradient, *weight_gradients((weight,), compute), None


class Sleeper(nn.Module):
    """A layer of both engines; ours passes a context, too."""

    def __init__(self, durations: Durations) -> None:
        super().__init__()
        self.durations = durations
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        return Sleep.apply(x, self.weight, self.durations)


class Entrance(nn.Embedding):
    """Makes activations of tokens, in no time to speak of."""

    def forward(self, token_BS: Tensor, context: object = None) -> Tensor:
        return super().forward(token_BS)


def mean_square(output_BSD: Tensor, _: object) -> Tensor:
    """The loss of both."""
    return output_BSD.square().mean()


class Rank:
    """The functions that ``schedule_processes.py`` calls by name, and the engines that are kept between the calls."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._steps: dict[Contestant, Callable[[], float]] = {}

    def prepare(self, contestants: Sequence[Contestant], work: Work, micro_batches: int) -> None:
        """Build the engines, in place of those of the last call."""
        self._steps = {}
        for contestant in contestants:
            torch.manual_seed(0)
            build = self._deepspeed if contestant.schedule == "deepspeed" else self._ours
            self._steps[contestant] = build(contestant, work, micro_batches)

    def time_steps(self, rounds: int) -> dict[Contestant, list[float]]:
        """Seconds of an optimizer step, with the loss on every rank at its end.

        All contestants in turn from a common barrier, round after round, after a round that is not counted.
        """
        seconds: dict[Contestant, list[float]] = {contestant: [] for contestant in self._steps}
        for _ in range(rounds + 1):
            for contestant, step in self._steps.items():
                dist.barrier()
                started = time.perf_counter()
                step()
                seconds[contestant].append(time.perf_counter() - started)
        return {contestant: samples[1:] for contestant, samples in seconds.items()}

    def losses(self) -> list[float]:
        """The loss of one more step of every contestant."""
        return [step() for step in self._steps.values()]

    def _ours(self, contestant: Contestant, work: Work, micro_batches: int) -> Callable[[], float]:
        groups = self.groups
        if contestant.one_group:
            groups = dataclasses.replace(groups, up=groups.down)
        model = ModelConfig(
            num_layers=groups.world_size * contestant.chunks, hidden_size=work.hidden, num_attention_heads=1,
            ffn_hidden_size=work.hidden, seq_length=work.length, vocab_size=VOCABULARY,
        )  # fmt: skip
        durations = work.durations.per_chunk(contestant.chunks)
        layers = [LayerEntry(f"layers.{i}", Sleeper, (durations,)) for i in range(model.num_layers)]
        entries = [LayerEntry("embedding", Entrance, (VOCABULARY, work.hidden)), *layers]
        bounds = [0, *range(2, model.num_layers + 2)]
        schedule = SCHEDULES[contestant.schedule]
        module = StageModule(entries, bounds, schedule.placement, groups)
        settings, mpu = deepspeed_settings(micro_batches), module.mpu()
        engine = TableEngine(
            args=None, model=module, optimizer=optimizer(module), mpu=mpu, config=settings,
            config_class=DeepSpeedConfig(settings, mpu), groups=groups, schedule=schedule, seed=0, model_config=model,
            moe=None, objective=lambda output, batch: Losses(mean_square(output, batch), None),
        )  # fmt: skip
        names = [f"{entry.name}.weight" for entry in entries]
        engine.install_global_norm(names, module.logical_names())
        batches = [batch(work) for _ in range(micro_batches)]

        def step() -> float:
            sums = engine.train_step(batches, num_counted=micro_batches, step=0)
            return groups.sum_over_world(sums)[0].item() / micro_batches

        return step

    def _deepspeed(self, _: Contestant, work: Work, micro_batches: int) -> Callable[[], float]:
        layers = [LayerSpec(Sleeper, work.durations) for _ in range(self.groups.world_size)]
        module = PipelineModule(
            [LayerSpec(Entrance, VOCABULARY, work.hidden), *layers],
            num_stages=self.groups.world_size,
            loss_fn=mean_square,
            partition_method="type:Sleeper",
        )
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer(module), config=deepspeed_settings(micro_batches)
        )
        data = batch(work)
        return lambda: engine.train_batch(repeat((data.token_BS, data.label_BS))).item()


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """The same for both; at this rate the weights stay what they are."""
    return torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def deepspeed_settings(micro_batches: int) -> dict[str, int]:
    """DeepSpeed's defaults: fp32, no ZeRO, which with one data rank is what both do fastest; nothing is printed."""
    return {
        "train_batch_size": micro_batches, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9,
    }  # fmt: skip


def batch(work: Work) -> Batch:
    """One document."""
    token_BS = torch.arange(work.length)[None] % VOCABULARY
    return Batch(
        token_BS=token_BS, label_BS=token_BS, counted_BS=torch.ones_like(token_BS, dtype=torch.bool),
        document_BS=torch.zeros_like(token_BS), position_BS=torch.arange(work.length)[None],
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(pipeline_model_parallel_size=size, distributed_timeout_minutes=2.0)
    with distributed(parallel) as groups:
        rank = Rank(groups)
        network.serve({function.__name__: function for function in (rank.prepare, rank.time_steps, rank.losses)})


if __name__ == "__main__":
    main()
