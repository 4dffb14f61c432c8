"""The training loop: everything that happens between two optimizer steps is on this page."""

import math
import time
from dataclasses import dataclass

import psutil
import torch

from megatron_ds.errors import DivergedError, PreemptedError
from megatron_ds.train.build import Run
from megatron_ds.train.evaluation import evaluate
from megatron_ds.train.metrics import StepRow


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured; the same on every rank."""

    loss: float
    """Mean over the counted tokens of the global batch, in nats."""
    mtp_loss: float | None
    """The same of the blocks that predict further tokens; None without such."""
    batch_size: int
    """Sequences of the global batch."""
    num_counted: int
    lr: float
    seconds: float
    data_seconds: float
    out_of_time: bool
    """Rank 0's clock has passed exit_duration_in_mins."""
    preempted: bool
    """Some rank was asked to stop."""


def train(run: Run) -> None:
    """Train to the last step (or to a reason to stop), evaluating and saving on the way."""
    training = run.config.megatron_ds.training
    if training.skip_train:
        evaluate(run)
        return
    if run.step >= training.train_iters:
        run.monitor.message(
            f"nothing left to train: step {run.step} of {training.train_iters}; raise --train-iters to go on"
        )
        return
    if run.step == 0 and training.eval_interval is not None:
        evaluate(run)
    while run.step < training.train_iters:
        result = step(run)
        record(run, result)
        if not math.isfinite(result.loss):
            raise DivergedError(
                f"the loss is {result.loss} at step {run.step}; lower --lr or lengthen the warmup, "
                f"and resume from the checkpoint before it"
            )
        if due(run.step, training.eval_interval) or run.step == training.train_iters:
            evaluate(run)
        run.save()
        if result.out_of_time or result.preempted or due(run.step, training.exit_interval):
            break
    run.finish()
    if result.preempted:
        run.groups.barrier()  # the launcher ends all ranks when it notices that one has ended
        run.preemption.settle()
        raise PreemptedError(f"stopped by a signal, saved at step {run.step}; the same command goes on from there")


def record(run: Run, result: StepResult) -> None:
    """Tell the monitor about the step that was just taken."""
    engine = run.engine
    run.checkpoints.took_step(result.seconds)
    run.monitor.step(
        StepRow(
            step=run.step,
            consumed_samples=run.consumed_samples,
            consumed_tokens=run.consumed_tokens,
            batch_size=result.batch_size,
            loss=result.loss,
            mtp_loss=result.mtp_loss,
            counted_tokens=result.num_counted,
            lr=result.lr,
            grad_norm=engine.gradient_norm,
            loss_scale=engine.current_loss_scale,
            skipped=engine.was_skipped,
            step_seconds=result.seconds,
            data_seconds=result.data_seconds,
            flops_per_token=run.flops_per_token,
            host_rss_bytes=psutil.Process().memory_info().rss,
            device_peak_bytes=engine.device_peak_bytes,
            expert_load=engine.expert_load,
        )
    )


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every ``interval`` steps happens after this one."""
    return interval is not None and step % interval == 0


def step(run: Run) -> StepResult:
    """One optimizer step: fetch the global batch, count its targets, run the engine, sum up what happened."""
    started = time.perf_counter()
    batches = run.next_batches()
    counts = torch.tensor([sum(batch.num_counted for batch in batches)], device=run.groups.device)
    num_counted = int(run.groups.sum_over("data", counts))
    data_seconds = time.perf_counter() - started

    lr = run.learning_rate.at(run.step, run.consumed_samples, run.consumed_tokens)
    run.engine.set_learning_rate(lr)
    losses = run.engine.train_step(
        batches,
        num_counted=num_counted,
        step=run.step,
        mtp_weight=run.mtp_weight.at(run.consumed_tokens),
        bias_rate=run.bias_rate.at(run.consumed_tokens),
    )
    if run.average is not None and not run.engine.was_skipped:
        run.average.update()
    asked = losses.new_tensor([run.groups.rank == 0 and run.out_of_time, run.preemption.requested])
    main, mtp, out_of_time, preempted = run.groups.sum_over_world(torch.cat([losses, asked])).tolist()
    loss, batch_size = main / max(num_counted, 1), run.batch_size
    run.advance(loss)
    return StepResult(
        loss=loss,
        mtp_loss=mtp / max(num_counted, 1) if run.config.megatron_ds.model.mtp_num_layers else None,
        batch_size=batch_size,
        num_counted=num_counted,
        lr=lr,
        seconds=time.perf_counter() - started,
        data_seconds=data_seconds,
        out_of_time=out_of_time > 0,
        preempted=preempted > 0,
    )
