"""The running mean of the weights against a slow loop over whole tensors; ``test_reshard.py`` moves it elsewhere."""

import pytest
import torch
from ranks import run_ranks
from tiny import build, take_step

DECAY = 0.75
LATENT = {
    "attention": {"kind": "latent", "kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
    "num_query_groups": None,
    "qk_layernorm": False,
}
LAYOUTS = [
    (1, {"stage": 0}),
    (2, {"stage": 1, "dtype": "bf16"}),
    (2, {"stage": 3}),
    (4, {"stage": 1, "pp": 2, "tp": 2, "model": LATENT}),
]


def save_each(groups, options, directory, steps):
    """Train, saving the state after every step and before the first."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore
    from megatron_ds.engine.average import WeightAverage
    from megatron_ds.engine.state import counters, fragments

    config, engine, weights = build(groups, options)
    average = WeightAverage(engine, weights, DECAY)
    store = CheckpointStore(Path(directory), groups)
    for step in range(steps + 1):
        trainer = {"engine": counters(engine)}
        store.save(step, fragments(engine, weights, average), rank_state={}, trainer=trainer, config={})
        if step < steps:
            take_step(groups, config, engine, step, 1e-2)
            average.update()


def resave(groups, options, source, directory):
    """Load the weights alone, and save again."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
    from megatron_ds.engine.average import WeightAverage
    from megatron_ds.engine.state import counters, fragments, restore_weights

    _, engine, weights = build(groups, options)
    average = WeightAverage(engine, weights, DECAY)
    checkpoint = open_checkpoint(Path(source), peers=groups)
    restore_weights(engine, weights, checkpoint)
    average.reset()
    trainer = {"engine": counters(engine)}
    store = CheckpointStore(Path(directory), groups)
    store.save(0, fragments(engine, weights, average), rank_state={}, trainer=trainer, config={})


def read(directory, kind):
    from megatron_ds.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name, kind) for name in checkpoint.shapes(kind)}


def call(function, size, options, *arguments):
    axes = {"pipeline_model_parallel_size": options.get("pp", 1), "tensor_model_parallel_size": options.get("tp", 1)}
    return run_ranks(function, size, options, *arguments, parallel=axes)


@pytest.mark.parametrize(("size", "options"), LAYOUTS, ids=str)
def test_the_mean_equals_a_loop_over_the_weights(tmp_path, size, options):
    call(save_each, size, options, str(tmp_path), 3)
    mean = {name: value.clone() for name, value in read(tmp_path / "global_step0", "weight").items()}
    for step in range(4):
        here = tmp_path / f"global_step{step}"
        weights, saved = read(here, "weight"), read(here, "ema")
        assert saved and all(value.dtype == torch.float32 for value in saved.values())
        for name, value in saved.items():
            if step:
                mean[name] = DECAY * mean[name] + (1 - DECAY) * weights[name]
            torch.testing.assert_close(value, mean[name], rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(saved[name], weights[name]) for name in saved)


def test_exports_read_the_mean_and_a_run_that_takes_the_weights_alone_begins_with_them(tmp_path):
    from megatron_ds.checkpoint.store import open_checkpoint
    from megatron_ds.errors import CheckpointError

    call(save_each, 2, {"stage": 1, "pp": 2}, str(tmp_path / "a"), 2)
    before = read(tmp_path / "a", "ema")
    averaged = open_checkpoint(tmp_path / "a").averaged()
    assert averaged.shapes() == open_checkpoint(tmp_path / "a").shapes()
    assert all(torch.equal(averaged.read(name), value) for name, value in before.items())
    call(resave, 1, {"stage": 0}, str(tmp_path / "a"), str(tmp_path / "fresh"))
    weights, fresh = read(tmp_path / "a", "weight"), read(tmp_path / "fresh", "ema")
    assert all(torch.equal(weights[name], value) for name, value in fresh.items()), "begins with the weights alone"
    with pytest.raises(CheckpointError, match=r"exp_avg of embedding\.weight; it has weight, ema"):
        open_checkpoint(tmp_path / "fresh").read("embedding.weight", "exp_avg")
