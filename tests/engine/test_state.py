"""The training state by name: what one layout saves, every other restores to the same bits and continues from."""

import pytest
import torch
from ranks import run_ranks
from tiny import configuration, micro_batches

LAYOUTS = [
    (1, {"stage": 0}),
    (2, {"stage": 0, "pp": 2}),
    (4, {"stage": 1, "pp": 2}),
    (2, {"stage": 1}),
    (3, {"stage": 2, "micro": 1, "batch": 9}),
    (2, {"stage": 3}),
    (4, {"stage": 3}),
    (2, {"stage": 1, "dtype": "bf16"}),
]


def build(groups, options):
    from deepspeed.accelerator import get_accelerator

    from megatron_ds.engine.initialize import build_engine
    from megatron_ds.train.objective import pretraining

    get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes it without instructions of the CPU
    config = configuration(groups.world_size, **options)
    return config, *build_engine(config, groups, pretraining(config.megatron_ds.model))


def steps(groups, config, engine, first, last):
    """Losses of steps first..last-1."""
    losses = []
    for step in range(first, last):
        batches = micro_batches(config, groups, step)
        counted = int(groups.sum_over("data", torch.tensor(sum(batch.num_counted for batch in batches))))
        engine.set_learning_rate(3e-3)
        loss = engine.train_step(batches, num_counted=counted, step=step)
        losses.append(groups.sum_over_world(loss).item() / counted)
    return losses


def save(groups, options, directory):
    """Train three steps, save, train two more."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore
    from megatron_ds.engine.state import counters, fragments

    config, engine, parameters = build(groups, options)
    steps(groups, config, engine, 0, 3)
    CheckpointStore(Path(directory), groups).save(
        3, fragments(engine, parameters), rank_state={}, trainer={"engine": counters(engine)}, config={}
    )
    return steps(groups, config, engine, 3, 5)


def load(groups, options, directory, resaved):
    """Restore, save again at once, then train two steps."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
    from megatron_ds.engine.state import counters, fragments, restore

    config, engine, parameters = build(groups, options)
    checkpoint = open_checkpoint(Path(directory), peers=groups)
    restore(engine, parameters, checkpoint, checkpoint.trainer["engine"])
    CheckpointStore(Path(resaved), groups).save(
        3, fragments(engine, parameters), rank_state={}, trainer={"engine": counters(engine)}, config={}
    )
    return steps(groups, config, engine, 3, 5)


def call(function, size, options, *arguments):
    return run_ranks(
        function, size, options, *arguments, parallel={"pipeline_model_parallel_size": options.get("pp", 1)}
    )[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one fp32 rank, and the losses it continues with."""
    directory = tmp_path_factory.mktemp("saved")
    return directory, call(save, 1, {"stage": 0}, str(directory))


def contents(directory):
    from megatron_ds.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(directory)
    names = checkpoint.shapes()
    return {(name, kind): checkpoint.read(name, kind) for name in names for kind in checkpoint.kinds(name)}, checkpoint


@pytest.mark.parametrize(("size", "options"), LAYOUTS, ids=str)
def test_every_layout_restores_the_same_bits(saved, tmp_path, size, options):
    directory, continued = saved
    losses = call(load, size, options, str(directory), str(tmp_path))
    before, old = contents(directory)
    after, new = contents(tmp_path)
    assert before.keys() == after.keys() and len(before) > 40
    assert {kind for _, kind in before} == {"weight", "exp_avg", "exp_avg_sq"}
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert old.trainer["engine"] == new.trainer["engine"]
    relative = 2e-2 if options.get("dtype") == "bf16" else 1e-6
    if "batch" not in options:
        assert losses == pytest.approx(continued, rel=relative)


@pytest.mark.parametrize(
    ("size", "options"), [*LAYOUTS[:1], *LAYOUTS[2:4], *LAYOUTS[6:], (1, {"stage": 1, "dtype": "fp16"})], ids=str
)
def test_the_same_layout_continues_bit_identically(tmp_path, size, options):
    continued = call(save, size, options, str(tmp_path / "a"))
    assert call(load, size, options, str(tmp_path / "a"), str(tmp_path / "b")) == continued
