"""Distributed experts train the model that one process trains: losses, norms, gradients and loads.

The reference is one rank with all experts and the same global batches. Every layout routes the same tokens to the same
experts; only the order of sums differs.
"""

import pytest
import torch
from ranks import run_ranks
from tiny import FEW, STEPS, assert_close, assert_learns, build, configuration, parallel, take_step, train_ranks

MOE = {
    "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 16,
    "moe_layer_freq": [0, 1, 1, 1], "moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3,
}  # fmt: skip
MODEL = {"attention": {"kind": "full"}, "qk_layernorm": False, "rotary_interleaved": True}
DISPATCHERS = ("all_to_all", "ring", "hierarchical")


def options(moe=None, **more):
    return {"moe": MOE | (moe or {}), "model": MODEL | more.pop("model", {}), **more}


def run(world_size, steps=STEPS, **layout):
    return train_ranks(world_size, options(**layout), steps)


@pytest.fixture(scope="module")
def one_rank():
    reference = run(1)
    assert_learns(reference)
    return reference


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(("ep", "pp"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_layouts_train_the_same_model(one_rank, ep, pp, dispatcher):
    assert_close(run(ep * pp, ep=ep, pp=pp, stage=1, moe={"dispatcher": dispatcher}), one_rank, 1e-5)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"pp": 2}),
        (2, {}),
        (4, {"ep": 2, "stage": 0}),  # two replicas of every expert
        (4, {"ep": 2, "stage": 1}),
        (4, {"ep": 2, "stage": 2}),
        (4, {"pp": 4, "stage": 1}),
        (8, {"ep": 2, "pp": 4, "stage": 1}),  # the first stage has no experts
        (4, {"ep": 2, "pp": 2, "stage": 0, "micro": 2}),
    ],
    ids=str,
)
def test_other_axes(one_rank, world_size, layout):
    if "micro" in layout:  # the Switch loss is a mean over a micro-batch, so it depends on its size
        without = {"moe_aux_loss_coeff": 0.0}
        assert_close(run(world_size, FEW, moe=without, **layout), run(1, FEW, moe=without), 1e-5)
    else:
        assert_close(run(world_size, FEW, **layout), one_rank, 1e-5)


def test_pipelines_are_bit_identical():
    assert run(2, pp=2, stage=1) == run(1, stage=1)


def test_a_stage_without_experts_trains():
    """On the last stage and on the first; tied embeddings."""
    for frequency in ([1, 1, 0, 0], [0, 0, 1, 1]):
        for tied in (True, False):
            layout = {"moe": {"moe_layer_freq": frequency}, "model": {"untie_embeddings_and_output_weights": not tied}}
            assert_close(run(4, FEW, ep=2, pp=2, stage=1, **layout), run(1, FEW, **layout), 1e-5)


@pytest.mark.parametrize(
    "moe",
    [
        {"moe_router_topk": 1, "router": {"kind": "softmax", "fine": "none", "norm_topk_prob": False}},
        {"router": {"kind": "sigmoid", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}},
        {"router": {"kind": "softmax", "fine": "refine"}},
        {"moe_seq_aux_loss_coeff": 1e-2, "moe_global_aux_loss_coeff": 1e-2, "moe_input_jitter_eps": 0.1},
        {"experts": "loop", "moe_shared_expert_intermediate_size": None},
    ],
    ids=str,
)
def test_routers_and_losses(moe):
    assert_close(run(4, FEW, ep=4, stage=1, moe=moe), run(1, FEW, moe=moe), 1e-5)


@pytest.mark.parametrize(
    "capacity",
    [{"kind": "fixed", "factor": 1.0}, {"kind": "dynamic", "factor": 1.0, "drop_policy": "position"}],
    ids=str,
)
def test_capacities(capacity):
    """Few steps: who gets a full expert's last slot is decided by the last bits of two weights, and then another token
    is dropped."""
    moe = {"capacity": capacity}
    assert_close(run(4, steps=4, ep=4, stage=1, moe=moe), run(1, steps=4, moe=moe), 1e-5)


def test_recompute_changes_nothing():
    layout = {"ep": 2, "stage": 1, "model": {"hidden_dropout": 0.1}}
    assert run(2, FEW, training={"recompute_granularity": "full"}, **layout) == run(2, FEW, **layout)


def test_bf16_follows_fp32(one_rank):
    alone = run(1, FEW, dtype="bf16", stage=1)
    assert_close(alone[:1], one_rank[:1], 3e-2)
    assert_close(run(2, FEW, ep=2, dtype="bf16", stage=1)[:1], alone[:1], 2e-2)
    assert_close(run(4, FEW, ep=2, pp=2, dtype="bf16", stage=1)[:1], alone[:1], 2e-2)
    assert_close(run(2, FEW, ep=2, dtype="bf16", stage=2)[:1], alone[:1], 2e-2)


def train_and_save(groups, layout, directory, steps=1):
    """Train some steps and save; the loads of each step, and the biases at the end."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore
    from megatron_ds.engine.state import counters, fragments

    config, engine, weights = build(groups, layout)
    loads = []
    for step in range(steps):
        take_step(groups, config, engine, step, 1e-3)
        loads.append((engine.expert_load.chosen_LE, engine.expert_load.dropped_LE))
    CheckpointStore(Path(directory), groups).save(
        steps, fragments(engine, weights), rank_state={}, trainer={"engine": counters(engine)}, config={}
    )
    biases = {name: weight.clone() for name, weight in weights.items() if name.endswith("router.bias")}
    return loads, biases


def saved(world_size, directory, steps=1, **layout):
    return run_ranks(
        train_and_save, world_size, options(**layout), str(directory), steps, parallel=parallel(**layout), timeout=240
    )


def contents(directory):
    from megatron_ds.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(directory)
    return {
        (name, kind): checkpoint.read(name, kind) for name in checkpoint.shapes() for kind in checkpoint.kinds(name)
    }


@pytest.mark.parametrize(
    ("world_size", "layout", "dispatcher"),
    [
        *((4, {"ep": 4}, dispatcher) for dispatcher in DISPATCHERS),
        (2, {"ep": 2}, "ring"),
        (8, {"ep": 4, "pp": 2}, "ring"),
    ],
    ids=str,
)
def test_every_gradient(tmp_path, world_size, layout, dispatcher):
    """After the first step Adam's first moment is a tenth of the gradient, whatever the layout of the optimizer."""
    saved(1, tmp_path / "one", clipping=0.0)
    saved(world_size, tmp_path / "many", clipping=0.0, stage=1, moe={"dispatcher": dispatcher}, **layout)
    ours, reference = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert ours.keys() == reference.keys()
    gradients = [key for key in reference if key[1] == "exp_avg"]
    assert len(gradients) > 40
    for key in gradients:
        assert reference[key].abs().max() > 0, key
        torch.testing.assert_close(ours[key], reference[key], rtol=0, atol=1e-5 * reference[key].abs().max().item())


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"ep": 2}), (4, {"ep": 4}), (4, {"ep": 2, "pp": 2})])
def test_loads_add_up_and_biases_agree(tmp_path, world_size, layout):
    results = saved(world_size, tmp_path, steps=3, **layout)
    config = configuration(world_size, **options(**layout))
    assignments = config.train_batch_size * config.megatron_ds.model.seq_length * MOE["moe_router_topk"]
    for loads, _ in results:
        for chosen_LE, dropped_LE in loads:
            assert chosen_LE.shape == (3, 8) and chosen_LE.sum(1).tolist() == [assignments] * 3
            assert dropped_LE.sum() == 0
    biases = {}
    for _, held in results:
        for name, bias in held.items():
            assert torch.equal(biases.setdefault(name, bias), bias), f"{name} differs between ranks"
            assert bias.abs().max() > 0 and bias.dtype == torch.float32
    assert len(biases) == 3


SKEWS = {
    "one rank gets everything": [9, 9, 0, 0, 0, 0, 0, 0],
    "an expert never gets a token": [0, 0, 0, -9, 0, 0, 0, 0],
    "all tokens choose one expert first": [9, 0, 0, 0, 0, 0, 0, 0],
}


def skewed(groups, layout, directory, bias):
    """Losses of three steps with fixed biases, and a checkpoint after the first step."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore
    from megatron_ds.engine.state import counters, fragments

    config, engine, weights = build(groups, layout)
    for name, weight in weights.items():
        if name.endswith("router.bias"):
            weight.copy_(torch.tensor(bias))
    losses = []
    for step in range(3):
        losses.append(take_step(groups, config, engine, step, 1e-3, bias_rate=0.0)[0])
        if step == 0:
            CheckpointStore(Path(directory), groups).save(
                1, fragments(engine, weights), rank_state={}, trainer={"engine": counters(engine)}, config={}
            )
    return losses, engine.expert_load.chosen_LE


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("skew", SKEWS)
def test_empty_experts_and_empty_ranks(tmp_path, skew, dispatcher):
    arguments = [float(value) for value in SKEWS[skew]]
    moe = {"dispatcher": dispatcher}
    one = run_ranks(skewed, 1, options(clipping=0.0, moe=moe), str(tmp_path / "one"), arguments)
    four = run_ranks(
        skewed, 4, options(ep=4, stage=1, clipping=0.0, moe=moe), str(tmp_path / "four"), arguments,
        parallel=parallel(ep=4),
    )  # fmt: skip
    chosen_LE = four[0][1]
    assert (chosen_LE == 0).any() or skew.startswith("all")
    assert chosen_LE[:, 0].tolist() == [chosen_LE[0].sum() / 2] * 3 or "never" in skew
    assert four[0][0] == pytest.approx(one[0][0], rel=1e-5)
    ours, reference = contents(tmp_path / "four"), contents(tmp_path / "one")
    for key in (key for key in reference if key[1] == "exp_avg"):
        torch.testing.assert_close(ours[key], reference[key], rtol=0, atol=1e-5 * reference[key].abs().max().item())
