"""Evaluate the model on the named validation sets: token-weighted loss, perplexity and bits per byte.

A set is a finite list of samples. Its last global batch may be incomplete: the loader fills it with samples that are
not counted, so every rank has the same number of micro-batches and every token of the set counts once. The loss is that
of the next token alone: neither MTP blocks nor the balancing losses of experts have a part in it.
"""

import torch

from megatron_ds.data.loader import BatchLoader, EvalDataset
from megatron_ds.train.build import Run
from megatron_ds.train.metrics import EvalResult


def evaluate(run: Run) -> dict[str, EvalResult]:
    """Evaluate every set, report to the monitor, return the results (the same on every rank)."""
    with run.monitor.phase("evaluating"):
        results = {name: _evaluate_set(run, dataset) for name, dataset in run.datasets.eval.items()}
    if results:
        run.monitor.evaluation(run.step, results)
        run.eval_losses = {name: result.loss for name, result in results.items()}
    return results


def _evaluate_set(run: Run, dataset: EvalDataset) -> EvalResult:
    config, groups = run.config, run.groups
    loader = BatchLoader(
        dataset,
        micro_batch_size=config.train_micro_batch_size_per_gpu,
        data_rank=groups.index("data"),
        data_size=groups.topology.data,
    )
    whole = -(-len(dataset) // config.train_batch_size)
    limit = config.megatron_ds.training.eval_iters
    totals = torch.zeros(2, dtype=torch.float64, device=groups.device)  # loss sum, counted tokens
    for index in range(whole if limit is None else min(limit, whole)):
        first = index * config.train_batch_size
        batches = [batch.to(groups.device) for batch in loader.global_batch(first, config.gradient_accumulation_steps)]
        totals[0] += run.engine.evaluate(batches)
        totals[1] += sum(batch.num_counted for batch in batches) if run.engine.computes_loss else 0
    loader.close()
    loss_sum, tokens = groups.sum_over_world(totals).tolist()
    num_bytes = tokens * dataset.bytes_per_token if dataset.bytes_per_token else None
    return EvalResult(loss_sum / max(tokens, 1), int(tokens), num_bytes)
