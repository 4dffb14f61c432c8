"""A tiny run for tests of the engines: its configuration, global batches that are the same everywhere, a short loop."""

import torch

STEPS = 20
GLOBAL_BATCH = 8
TINY = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
    "seq_length": 24, "vocab_size": 61, "make_vocab_size_divisible_by": 16,
    "attention": {"kind": "hybrid", "pattern": "LG", "window": 5},
}  # fmt: skip


def parallel(pp=1, ep=1, **_):
    """The ``parallel`` section of a layout; experts' nodes are pairs of ranks."""
    return {"pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep, "expert_ranks_per_node": 2}


def configuration(
    world_size,
    *,
    micro=1,
    batch=GLOBAL_BATCH,
    pp=1,
    ep=1,
    moe=None,
    stage=0,
    dtype="fp32",
    model=None,
    training=None,
    clipping=1.0,
    loss_scale_power=8,
):
    """A resolved configuration of a tiny model."""
    from megatron_ds.config.resolve import resolve
    from megatron_ds.config.schema import RunConfig

    tree = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": clipping,
        "optimizer": {"params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "megatron_ds": {
            "generation": "v2" if moe else "v1",
            "model": TINY | (model or {}),
            "moe": moe,
            "parallel": parallel(pp=pp, ep=ep),
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


def train(groups, options, steps=STEPS):
    """Losses and gradient norms of the first steps, as rank 0 would log them."""
    from megatron_ds.engine.initialize import build_engine
    from megatron_ds.train.objective import pretraining

    config = configuration(groups.world_size, **options)
    engine, _ = build_engine(config, groups, pretraining(config.megatron_ds.model))
    losses, norms = [], []
    for step in range(steps):
        batches = micro_batches(config, groups, step)
        counted = int(groups.sum_over("data", torch.tensor(sum(batch.num_counted for batch in batches))))
        engine.set_learning_rate(3e-3 * min(1, step / 10))
        loss = groups.sum_over_world(engine.train_step(batches, num_counted=counted, step=step))
        losses.append(loss.item() / counted)
        norms.append(engine.gradient_norm)
    return losses, norms


def train_ranks(world_size, options, steps=STEPS):
    """``train`` on so many ranks, which must agree; losses and gradient norms."""
    from ranks import run_ranks

    results = run_ranks(train, world_size, options, steps, parallel=parallel(**options), timeout=240)
    assert all(result == results[0] for result in results), "the ranks disagree about losses or norms"
    return results[0]


def assert_close(result, reference, relative):
    """Losses and norms of two runs agree at every step."""
    import pytest

    for ours, theirs in zip(result, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=relative, abs=0)


def assert_learns(result):
    """The run is worth comparing with."""
    losses, norms = result
    assert losses[-1] < losses[0] and max(norms) > 1.0 > min(norms), "the reference must learn, and clip only at times"
