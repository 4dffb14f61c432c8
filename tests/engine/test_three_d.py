"""Every topology trains the model that one process trains: tensor x pipeline x data x expert, every schedule.

The model has all that the third generation can have: latent attention with compressed queries, a dense prefix, experts
in groups behind a sigmoid router, a shared expert, auxiliary losses, MTP blocks, packed documents and unequal
numbers of counted targets. Only the order of sums differs between topologies, and between schedules nothing does.
"""

from itertools import product

import pytest
import torch
from ranks import run_ranks
from tiny import FEW, STEPS, assert_close, assert_learns, build, micro_batch_size, parallel, take_step, train_ranks

MODEL = {
    "num_layers": 4, "num_query_groups": None, "qk_layernorm": False, "rotary_interleaved": True,
    "untie_embeddings_and_output_weights": True, "mtp_num_layers": 1,
    "attention": {
        "kind": "latent", "q_lora_rank": 20, "kv_lora_rank": 12, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
    },
}  # fmt: skip
MOE = {
    "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 16,
    "moe_layer_freq": [0, 1, 1, 1], "moe_seq_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3,
    "router": {"kind": "sigmoid", "fine": "bias", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5},
}  # fmt: skip
TWO_BLOCKS = {"mtp_num_layers": 2}
GQA = {"attention": {"kind": "hybrid", "pattern": "LG", "window": 5}, "qk_layernorm": True}


def options(model=None, moe=None, **more):
    return {"stage": 1, "model": MODEL | (model or {}), "moe": MOE | (moe or {}), **more}


def world(tp=1, pp=1, dp=None, ep=1, **_):
    return tp * pp * (dp or ep)


def run(steps=STEPS, dp=None, **layout):
    micro = micro_batch_size(dp or layout.get("ep", 1), layout.get("pp", 1))
    return train_ranks(world(dp=dp, **layout), options(**{"micro": micro} | layout), steps)


@pytest.fixture(scope="module")
def one_rank():
    reference = run()
    assert_learns(reference)
    assert reference[2][-1] < reference[2][0], "the MTP blocks must learn, too"
    return reference


def combinations():
    """Everything that fits into eight ranks."""
    for tp, pp, ep in product((1, 2, 4), repeat=3):
        schedules = ["1f1b", "interleaved", "zb_h1", "zb_v"] if pp > 1 else ["1f1b"]
        for schedule, sp, replicas in product(schedules, (False, True), (1, 2)):
            if (sp and tp == 1) or not 1 < tp * pp * ep * replicas <= 8:
                continue
            # Eight virtual stages for four layers: the second chunks have none, or only what follows the last layer.
            layout = [1] * 4 + [0] * 4 if pp == 4 and schedule in ("interleaved", "zb_v") else None
            sizes = {"tp": tp, "pp": pp, "dp": replicas * ep, "ep": ep}
            yield sizes | {"schedule": schedule, "sp": sp, "layout": layout}


TESTED = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"tp": 4, "sp": True},
    {"tp": 2, "sp": True, "ep": 2, "etp": 2},
    {"tp": 2, "ep": 2, "etp": 2},
    {"tp": 2, "dp": 2},
    {"tp": 2, "sp": True, "dp": 4, "ep": 2},
    {"tp": 4, "ep": 2, "etp": 4, "sp": True},
    {"pp": 2, "schedule": "interleaved"},
    {"pp": 2, "schedule": "zb_v", "ep": 2},
    {"pp": 4, "schedule": "zb_h1", "ep": 2},
    {"tp": 2, "pp": 2, "sp": True, "schedule": "interleaved"},
    {"tp": 2, "pp": 2, "ep": 2, "sp": True, "schedule": "interleaved"},
    {"tp": 2, "pp": 2, "ep": 2, "schedule": "1f1b"},
    {"tp": 2, "pp": 2, "ep": 2, "sp": True, "etp": 2, "schedule": "zb_v"},
    {"tp": 2, "pp": 4, "sp": True, "schedule": "zb_h1"},
]
"""Part of the table for every run of the tests; ``-m parity`` has all of it."""


@pytest.mark.parametrize("layout", TESTED, ids=str)
def test_topologies_train_the_same_model(one_rank, layout):
    assert_close(run(**layout), one_rank, 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("layout", list(combinations()), ids=str)
def test_the_whole_table(one_rank, layout):
    assert_close(run(**layout), one_rank, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_schedules_are_bit_identical(tied):
    model = {"untie_embeddings_and_output_weights": not tied}
    reference = run(FEW, model=model, micro=2)
    for pp, schedule in ((2, "1f1b"), (2, "interleaved"), (2, "zb_h1"), (2, "zb_v"), (4, "zb_h1")):
        assert run(FEW, model=model, pp=pp, schedule=schedule) == reference, (pp, schedule)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_under_tensor_parallelism(groups):
    """As many key heads as ranks, fewer, and one for all."""
    layout = {"model": MODEL | GQA | {"num_query_groups": groups}}
    reference = run(FEW, **layout)
    assert_close(run(FEW, tp=4, sp=True, **layout), reference, 1e-5)
    assert_close(run(FEW, tp=2, pp=2, schedule="zb_v", **layout), reference, 1e-5)


def test_explicit_layouts():
    reference = run(steps=4, micro=2)
    for pp, schedule, layers in (
        (2, "1f1b", [3, 1]), (2, "interleaved", [0, 2, 1, 1]), (2, "zb_v", [1, 2, 1, 0]),
        (4, "interleaved", [1] * 4 + [0] * 4), (4, "zb_v", [1] * 4 + [0] * 4),
    ):  # fmt: skip
        assert run(steps=4, pp=pp, schedule=schedule, layout=layers) == reference, (schedule, layers)


def train_and_save(groups, layout, directory):
    """Save after one step: Adam's first moment is then a tenth of the gradient."""
    from pathlib import Path

    from megatron_ds.checkpoint.store import CheckpointStore
    from megatron_ds.engine.state import counters, fragments

    config, engine, weights = build(groups, layout)
    take_step(groups, config, engine, 0, 1e-3)
    CheckpointStore(Path(directory), groups).save(
        1, fragments(engine, weights), rank_state={}, trainer={"engine": counters(engine)}, config={}
    )
    return engine.expert_load.auxiliary_loss_L.tolist(), engine.expert_load.chosen_LE.sum(1).tolist()


def saved(directory, dp=None, **layout):
    """Auxiliary losses and assignments of every layer with experts; the checkpoint's first moments by name."""
    from megatron_ds.checkpoint.store import open_checkpoint

    size = world(dp=dp, **layout)
    results = run_ranks(
        train_and_save,
        size,
        options(model=TWO_BLOCKS, clipping=0.0, **layout),
        str(directory),
        parallel=parallel(**layout),
        timeout=240,
    )
    assert all(result == results[0] for result in results)
    checkpoint = open_checkpoint(directory)
    return *results[0], {
        name: checkpoint.read(name, "exp_avg") for name in checkpoint.shapes() if "exp_avg" in checkpoint.kinds(name)
    }


@pytest.fixture(scope="module")
def gradients_of_one_rank(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"tp": 4, "sp": True},
        {"tp": 2, "ep": 2, "etp": 2, "sp": True},
        {"tp": 2, "pp": 2, "ep": 2, "sp": True, "schedule": "interleaved"},
        {"tp": 2, "pp": 2, "dp": 2, "schedule": "zb_v"},
        {"pp": 4, "ep": 2, "schedule": "zb_h1"},
    ],
    ids=str,
)
def test_every_gradient_and_auxiliary_loss(gradients_of_one_rank, tmp_path, layout):
    auxiliary, assignments, reference = gradients_of_one_rank
    ours_auxiliary, ours_assignments, ours = saved(tmp_path, **layout)
    assert ours_auxiliary == pytest.approx(auxiliary, rel=1e-5, abs=0) and min(auxiliary) > 0
    assert ours_assignments == assignments and len(assignments) == 5, "three layers and two MTP blocks"
    assert ours.keys() == reference.keys() and len(reference) > 80
    for name, gradient in reference.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            ours[name],
            gradient,
            rtol=0,
            atol=1e-5 * gradient.abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_dropout_depends_on_no_topology():
    """Masks are drawn whole and cut, but for those on the probabilities of heads that other ranks have."""
    model = {"hidden_dropout": 0.1}
    reference = run(FEW, model=model, micro=2)
    assert reference != run(FEW, micro=2)
    assert_close(run(FEW, model=model, tp=2, sp=True, pp=2, schedule="zb_v"), reference, 1e-5)
    assert_close(run(FEW, model=model, micro=2, tp=2), reference, 1e-5)


def test_recompute_and_zero_stages(one_rank):
    layout = {"tp": 2, "sp": True, "pp": 2, "schedule": "interleaved"}
    assert_close(run(FEW, training={"recompute_granularity": "full"}, **layout), one_rank, 1e-5)
    assert_close(run(FEW, stage=0, **layout), one_rank, 1e-5)


def test_bf16_follows_fp32(one_rank):
    alone = run(FEW, dtype="bf16")
    assert_close(alone[:1], one_rank[:1], 3e-2)
    for layout in ({"tp": 2, "sp": True}, {"tp": 2, "pp": 2, "ep": 2, "schedule": "zb_v"}):
        assert_close(run(FEW, dtype="bf16", **layout)[:1], alone[:1], 2e-2)
    assert run(FEW, dtype="bf16", pp=2, schedule="zb_h1") == run(FEW, dtype="bf16", pp=2)
