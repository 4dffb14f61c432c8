"""Assemble a run: data, engine, checkpoints and monitor, each from its own section of the configuration.

``build_run`` is the only place that knows all parts. It ends where training can begin: the corpus has been checked, the
newest whole checkpoint has been restored, and the run directory belongs to this job.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.reader import Checkpoint, WeightSource
from megatron_ds.checkpoint.tiers import Snapshot
from megatron_ds.checkpoint.writing import Content
from megatron_ds.config.batch_plan import BatchPlan, batch_plan
from megatron_ds.config.load import LoadedConfig
from megatron_ds.config.lr_plan import warmup_tokens
from megatron_ds.config.resolve import with_vocabulary
from megatron_ds.config.schema import DataConfig, RunConfig
from megatron_ds.config.token_schedule import TokenSchedule
from megatron_ds.data import tokenizer
from megatron_ds.data.loader import Batch, BatchLoader, Datasets, build_datasets
from megatron_ds.engine.average import WeightAverage
from megatron_ds.engine.initialize import Engine, build_engine
from megatron_ds.engine.state import changed_on_load, counters, files_needed, fragments, restore, restore_weights
from megatron_ds.errors import ConfigError, MegatronError, PreemptedError
from megatron_ds.hf.decoder import check_tensors
from megatron_ds.model import cost
from megatron_ds.optim.lr_schedule import LearningRate
from megatron_ds.parallel.groups import Groups
from megatron_ds.parallel.random import generator_state, set_generator_state
from megatron_ds.train.checkpointing import Checkpointing, Start
from megatron_ds.train.metrics import RunFacts
from megatron_ds.train.monitor import Monitor
from megatron_ds.train.objective import pretraining
from megatron_ds.train.preemption import Preemption
from megatron_ds.train.run_directory import RunDirectory, State

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """Everything a training run has, and how far it has come."""

    config: RunConfig
    groups: Groups
    engine: Engine
    weights: dict[str, Tensor]
    """This rank's parameters and buffers by logical name."""
    loader: BatchLoader | None
    """Training batches; None with skip_train and no training data."""
    datasets: Datasets
    batch_plan: BatchPlan
    average: WeightAverage | None
    """Running mean of the weights, with ema_decay."""
    learning_rate: LearningRate
    mtp_weight: TokenSchedule
    """Weight of the loss of MTP blocks."""
    bias_rate: TokenSchedule
    """Step of the routers' balancing biases."""
    checkpoints: Checkpointing
    preemption: Preemption
    """Whether this rank was asked to stop."""
    monitor: Monitor
    flops_per_token: float
    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Sequences taken from the training data; with the seed it fixes the next batch."""
    consumed_tokens: int = 0
    train_loss: float | None = None
    """Loss of the last step."""
    eval_losses: dict[str, float] = field(default_factory=dict)
    """Losses of the last evaluation, by validation set."""
    started: float = field(default_factory=time.monotonic)

    @property
    def out_of_time(self) -> bool:
        """Whether exit_duration_in_mins has passed on this rank's clock."""
        minutes = self.config.megatron_ds.training.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self.started > 60 * minutes

    @property
    def batch_size(self) -> int:
        """Sequences of the next global batch."""
        return self.batch_plan.at(self.consumed_samples)

    def next_batches(self) -> list[Batch]:
        """This data rank's micro-batches of the next global batch, on its device."""
        micro_batches = self.batch_size // self.config.train_micro_batch_size_per_gpu // self.groups.topology.data
        batches = self.loader.global_batch(self.consumed_samples, micro_batches)
        return [batch.to(self.groups.device) for batch in batches]

    def advance(self, loss: float) -> None:
        """Count the step that was just taken."""
        size = self.batch_size
        self.train_loss = loss
        self.step += 1
        self.consumed_samples += size
        self.consumed_tokens += size * self.config.megatron_ds.model.seq_length

    def snapshot(self) -> Snapshot:
        """All that a checkpoint of this step holds of this rank; the tensors are those in use, not copies."""
        return Snapshot(
            self.step,
            fragments(self.engine, self.weights, self.average),
            Content(
                rank_state=generator_state(self.groups.device),
                trainer={
                    "step": self.step,
                    "consumed_samples": self.consumed_samples,
                    "consumed_tokens": self.consumed_tokens,
                    "train_loss": self.train_loss,
                    "eval": self.eval_losses,
                    "engine": counters(self.engine),
                    "wandb_run_id": self.monitor.run_id,
                },
                config=self.config.model_dump(mode="json"),
                extra_files=tokenizer.kept_files(self.config.megatron_ds.data.tokenizer),
            ),
        )

    def save(self) -> None:
        """Save what is due after this step, and tell how earlier saves went."""
        tiers = self.checkpoints.due(self.step)
        if tiers:
            self.checkpoints.save(self.snapshot(), tiers, self.monitor)
        else:
            self.checkpoints.report(self.monitor)

    def finish(self) -> None:
        """Make sure that the last step is saved."""
        self.checkpoints.finish(self.step, self.snapshot, self.monitor)

    def close(self, state: State, reason: str) -> None:
        """Write what is left to write, and tell how the run ended."""
        self.checkpoints.close(self.monitor)
        self.monitor.close(state, reason)

    def begin(self, source: WeightSource) -> None:
        """Take nothing but weights, which are known to be the model's."""
        restore_weights(self.engine, self.weights, source)
        if self.average is not None:
            self.average.reset()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of any layout, whose tensors are known to be the model's."""
        trainer = checkpoint.trainer
        restore(self.engine, self.weights, checkpoint, trainer.get("engine", {}), self.average)
        state = checkpoint.rank_state(self.groups.rank)
        if state is not None:
            set_generator_state(state, self.groups.device)
        self.step, self.consumed_samples = trainer["step"], trainer["consumed_samples"]
        self.consumed_tokens = trainer["consumed_tokens"]
        self.train_loss, self.eval_losses = trainer["train_loss"], trainer["eval"]


@contextmanager
def build_run(loaded: LoadedConfig, groups: Groups) -> Iterator[Run]:
    """Build the run, hand it over, and close it whatever happens: status.json and the ledger tell how it ended."""
    config = resolve_vocabulary(loaded.config)
    _require_same_everywhere(config, groups)
    directory = RunDirectory(Path(config.megatron_ds.monitor.run_dir) / config.megatron_ds.monitor.run_name)
    if groups.rank == 0:
        directory.acquire()
        directory.write_config(config.model_dump(mode="json"))
    preemption = Preemption()
    try:
        run = _assemble(config, loaded, groups, directory, preemption)
    except MegatronError as error:
        if groups.rank == 0:
            directory.write_status("failed", str(error))
        raise
    try:
        with preemption:
            yield run
    except KeyboardInterrupt:
        run.close("stopped", "interrupted")
        raise
    except PreemptedError as error:
        run.close("preempted", str(error))
        raise
    except BaseException as error:
        run.close("failed", f"{type(error).__name__}: {error}")
        raise
    else:
        done = run.step >= config.megatron_ds.training.train_iters or config.megatron_ds.training.skip_train
        run.close("finished" if done else "stopped", "" if done else "an exit condition was met")
    finally:
        directory.release()


def _assemble(
    config: RunConfig, loaded: LoadedConfig, groups: Groups, directory: RunDirectory, preemption: Preemption
) -> Run:
    ours = config.megatron_ds
    checkpoints = Checkpointing(config, groups, directory)
    with groups.rank_zero_first():  # rank 0 builds the sample indices, the others find them in the cache
        datasets = build_datasets(
            ours.data,
            seed=ours.training.seed,
            seq_length=ours.model.seq_length,
            vocab_size=ours.model.vocab_size,
            eod_id=ours.data.eod_id,
        )
    engine, weights = build_engine(config, groups, pretraining(ours.model, groups.tensor))
    plan = batch_plan(ours.training, config.train_batch_size, ours.model.seq_length)
    warm = warmup_tokens(ours.training, plan, ours.model.seq_length)
    with checkpoints.start(partial(files_needed, engine, weights)) as start:
        run = Run(
            config=config,
            groups=groups,
            engine=engine,
            weights=weights,
            loader=train_loader(config, groups, datasets),
            datasets=datasets,
            batch_plan=plan,
            average=WeightAverage(engine, weights, ours.training.ema_decay) if ours.training.ema_decay else None,
            learning_rate=LearningRate(ours.training, config.optimizer.params.lr, warm),
            mtp_weight=TokenSchedule.parse(ours.training.mtp_loss_scaling_factor),
            bias_rate=TokenSchedule.parse(ours.moe.moe_router_bias_update_rate if ours.moe else 0.0),
            checkpoints=checkpoints,
            preemption=preemption,
            monitor=_monitor(config, groups, directory, engine, start),
            flops_per_token=cost.flops_per_token(ours.model, ours.moe),
        )
        run.monitor.message(header(config, loaded, groups, directory))
        _begin(run, start)
    checkpoints.begin(run.step)
    return run


def _monitor(config: RunConfig, groups: Groups, directory: RunDirectory, engine: Engine, start: Start) -> Monitor:
    """The monitor, gone back to where the run starts."""
    ours = config.megatron_ds
    trainer = start.source.trainer if start.resumes else {}
    return Monitor(
        ours.monitor,
        config.wandb,
        directory,
        run_facts(config, groups),
        rank=groups.rank,
        config=config.model_dump(mode="json"),
        step=trainer.get("step", 0),
        samples=trainer.get("consumed_samples", 0),
        tokens=trainer.get("consumed_tokens", 0),
        # A checkpoint of another run starts a new curve.
        run_id=trainer.get("wandb_run_id") if not ours.checkpoint.load else None,
        event_writer=engine.monitor.write_events if engine.monitor.enabled else None,
    )


def _begin(run: Run, start: Start) -> None:
    """Load what the run starts from, and say so."""
    source, ours = start.source, run.config.megatron_ds
    notes = list(start.notes)
    if source is not None:
        check_tensors(source, ours.model, ours.moe)
    if start.resumes:
        notes += changed_on_load(source, run.config)
        run.resume(source)
        notes.append(f"resumed at step {run.step} from {source.path}")
    elif source is not None:
        run.begin(source)
        notes.append(f"begins with the weights in {source.path}")
    for note in notes:
        run.monitor.message(note)


def train_loader(config: RunConfig, groups: Groups, datasets: Datasets) -> BatchLoader | None:
    """Batches of the training data for this data rank."""
    if datasets.train is None:
        return None
    return BatchLoader(
        datasets.train,
        micro_batch_size=config.train_micro_batch_size_per_gpu,
        data_rank=groups.index("data"),
        data_size=groups.topology.data,
    )


def resolve_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with what the tokenizer knows: vocabulary size and end-of-document id."""
    data: DataConfig = config.megatron_ds.data
    if data.tokenizer is None:
        return config
    loaded = tokenizer.Tokenizer.load(data.tokenizer)
    return with_vocabulary(config, loaded.vocab_size, loaded.eod_id)


def run_facts(config: RunConfig, groups: Groups) -> RunFacts:
    """What gives the measurements of this run their scale."""
    ours, device = config.megatron_ds, groups.device
    on_cpu = device.type == "cpu"
    return RunFacts(
        name=ours.monitor.run_name,
        train_iters=ours.training.train_iters,
        seq_length=ours.model.seq_length,
        devices=groups.world_size,
        gradient_clipping=config.gradient_clipping,
        peak_flops=None if on_cpu else cost.device_peak(torch.get_device_module(device).get_device_name(device)),
        roof_flops=cost.measure_gemm_roof(DTYPES[config.dtype_name], device) if on_cpu else None,
        eval_interval=ours.training.eval_interval,
        save_interval=ours.checkpoint.save_interval,
    )


def header(config: RunConfig, loaded: LoadedConfig, groups: Groups, directory: RunDirectory) -> str:
    """What a user wants to see before the first step."""
    ours = config.megatron_ds
    active = f" ({cost.active_parameters(ours.model, ours.moe):,} active)" if ours.moe else ""
    lines = [
        f"{ours.monitor.run_name}: generation {ours.generation}, "
        f"{cost.num_parameters(ours.model, ours.moe):,} parameters{active}, {config.dtype_name}",
        f"  layout   {groups.topology.describe()}, ZeRO-{config.zero_optimization.stage}",
        f"  batch    {config.train_batch_size} sequences x {ours.model.seq_length} tokens = "
        f"{config.train_batch_size * ours.model.seq_length:,} tokens per step "
        f"({config.gradient_accumulation_steps} micro-batches of {config.train_micro_batch_size_per_gpu} per rank)",
        f"  run      {directory.path}",
        f"  config   {loaded.file or 'defaults'}" + "".join(f"\n           {change}" for change in loaded.changes),
    ]
    return "\n".join(lines)


def _require_same_everywhere(config: RunConfig, groups: Groups) -> None:
    """All ranks must train with the same configuration: a difference would end in a hang, or in silence."""
    digest = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    digests = groups.gather_objects(digest)
    if len(set(digests)) > 1:
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise ConfigError(
            f"ranks {odd} have another configuration than rank 0; start all with the same command and files"
        )
