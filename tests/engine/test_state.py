"""The training state by name: what one layout saves, every other restores to the same bits and continues from."""

import pytest
import tiny
import torch
from ranks import run_ranks

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

    get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes it without instructions of the CPU
    return tiny.build(groups, options)


def steps(groups, config, engine, first, last):
    """Losses of steps first..last-1."""
    return [tiny.take_step(groups, config, engine, step, 3e-3)[0] for step in range(first, last)]


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
