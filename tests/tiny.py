"""A tiny run for tests of the engines: its configuration, global batches that are the same everywhere, a short loop."""

import json
from functools import cache

import torch

STEPS = 20
FEW = 8  # steps that show whether a variant of a layout that is compared over all STEPS trains the same
GLOBAL_BATCH = 8
MTP_WEIGHT, BIAS_RATE = 0.3, 1e-3
TINY = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
    "seq_length": 24, "vocab_size": 61, "make_vocab_size_divisible_by": 16,
    "attention": {"kind": "hybrid", "pattern": "LG", "window": 5},
}  # fmt: skip


def parallel(pp=1, ep=1, tp=1, sp=False, etp=1, schedule="1f1b", chunks=None, layout=None, **_):
    """The ``parallel`` section of a layout; experts' nodes are pairs of ranks."""
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": sp,
        "pipeline_model_parallel_size": pp,
        "schedule": {"kind": schedule},
        "num_virtual_stages_per_pipeline_rank": chunks,
        "pipeline_model_parallel_layout": layout,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "expert_ranks_per_node": 2,
    }


def configuration(
    world_size,
    *,
    micro=1,
    batch=GLOBAL_BATCH,
    moe=None,
    stage=0,
    dtype="fp32",
    model=None,
    training=None,
    clipping=1.0,
    loss_scale_power=8,
    **axes,
):
    """A resolved configuration of a tiny model; ``axes``: see ``parallel``."""
    from megatron_ds.config.resolve import resolve
    from megatron_ds.config.schema import RunConfig

    tree = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": clipping,
        "optimizer": {"params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "megatron_ds": {
            "generation": "v3",  # has every axis; its defaults are those of a file, not of the schema
            "model": TINY | (model or {}),
            "moe": moe,
            "parallel": parallel(**axes),
            "training": {"seed": 7, **(training or {})},
        },
    }
    if dtype != "fp32":
        tree[dtype] = {"enabled": True} | ({"initial_scale_power": loss_scale_power} if dtype == "fp16" else {})
    return resolve(RunConfig.model_validate(tree), world_size)


def global_batch(step, model, size=GLOBAL_BATCH):
    """The same sequences on every rank: a few documents each, and a random share of the targets counted."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (size, model.seq_length)
    # Half of the tokens follow from the one before, so that there is something to learn.
    tokens = torch.randint(model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    for column in range(1, shape[1] + 1):
        follows = torch.rand(shape[0], generator=generator) < 0.5
        tokens[:, column] = torch.where(follows, (3 * tokens[:, column - 1] + 1) % model.vocab_size, tokens[:, column])
    document = (torch.rand(shape, generator=generator) < 0.08).cumsum(1)
    first = torch.zeros(shape, dtype=torch.long)
    for column in range(1, shape[1]):
        same = document[:, column] == document[:, column - 1]
        first[:, column] = torch.where(same, first[:, column - 1], column)
    return {
        "token_BS": tokens[:, :-1],
        "label_BS": tokens[:, 1:],
        "counted_BS": torch.rand(shape, generator=generator) < torch.rand(shape[0], 1, generator=generator),
        "document_BS": document,
        "position_BS": torch.arange(shape[1]) - first,
    }


def micro_batches(config, groups, step):
    """This data rank's slices, by Megatron's rule."""
    from megatron_ds.data.loader import Batch

    whole, micro, data = (
        global_batch(step, config.megatron_ds.model, config.train_batch_size),
        config.train_micro_batch_size_per_gpu,
        groups.topology.data,
    )
    return [
        Batch(**{name: value[start : start + micro] for name, value in whole.items()})
        for index in range(config.gradient_accumulation_steps)
        for start in [(index * data + groups.index("data")) * micro]
    ]


def build(groups, options):
    """Configuration, engine and this rank's weights."""
    from megatron_ds.engine.initialize import build_engine
    from megatron_ds.train.objective import pretraining

    config = configuration(groups.world_size, **options)
    return config, *build_engine(config, groups, pretraining(config.megatron_ds.model, groups.tensor))


def take_step(groups, config, engine, step, lr, bias_rate=BIAS_RATE):
    """One optimizer step; main and MTP loss per counted token of the global batch, the same on every rank."""
    batches = micro_batches(config, groups, step)
    counted = int(groups.sum_over("data", torch.tensor(sum(batch.num_counted for batch in batches))))
    engine.set_learning_rate(lr)
    sums = engine.train_step(batches, num_counted=counted, step=step, mtp_weight=MTP_WEIGHT, bias_rate=bias_rate)
    return (groups.sum_over_world(sums) / counted).tolist()


def micro_batch_size(data, pp=1):
    """Two micro-batches where there is no pipeline; else of two sequences if every stage then has one to work on.

    Where losses and gradients do not depend on their size, only the order of sums and the masks of dropout do.
    """
    if pp == 1:
        return max(1, GLOBAL_BATCH // (2 * data))
    return 2 if pp * data <= 4 else 1


def train(groups, options, steps=STEPS):
    """Losses, gradient norms and MTP losses of the first steps, as rank 0 would log them."""
    config, engine, _ = build(groups, options)
    curves = [], [], []
    for step in range(steps):
        loss, mtp_loss = take_step(groups, config, engine, step, 3e-3 * min(1, step / 10))
        for curve, value in zip(curves, (loss, engine.gradient_norm, mtp_loss), strict=True):
            curve.append(value)
    return curves


def train_ranks(world_size, options, steps=STEPS):
    """``train`` on so many ranks, which must agree; its curves. What many tests compare with is trained once."""
    return _curves(world_size, json.dumps(options, sort_keys=True), steps)


@cache
def _curves(world_size, options, steps):
    from ranks import run_ranks

    options = json.loads(options)
    results = run_ranks(train, world_size, options, steps, parallel=parallel(**options), timeout=240)
    assert all(result == results[0] for result in results), "the ranks disagree about losses or norms"
    return results[0]


def assert_close(result, reference, relative):
    """The curves of two runs agree at every step; the reference may be longer."""
    import pytest

    for ours, theirs in zip(result, reference, strict=True):
        assert ours == pytest.approx(theirs[: len(ours)], rel=relative, abs=0)


def assert_learns(result):
    """The run is worth comparing with."""
    losses, norms, _ = result
    assert losses[-1] < losses[0] and max(norms) > 1.0 > min(norms), "the reference must learn, and clip only at times"
