"""What a run refuses to continue from, and what it says of a resume that cannot be exact.

That the state itself moves between layouts is tested in ``test_reshard.py``.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny import configuration


def restored(groups, directory, kept, counted=True, steps=2):
    """Save what ``kept`` accepts of a run, restore it into another engine and take a step there.

    Returns the error or None, whether the engine's weights are those it began with, and the loss of its next step.
    """
    import tiny

    from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
    from megatron_ds.engine.state import counters, fragments, restore
    from megatron_ds.errors import CheckpointError

    config, engine, weights = tiny.build(groups, {"stage": 1})
    for step in range(steps):
        tiny.take_step(groups, config, engine, step, 3e-3)
    written = (fragment for fragment in fragments(engine, weights) if kept(fragment.name, fragment.kind))
    saved = counters(engine) if counted else {}
    CheckpointStore(Path(directory), groups).save(steps, written, rank_state={}, trainer={"engine": saved}, config={})

    config, engine, weights = tiny.build(groups, {"stage": 1})
    before = {name: weight.clone() for name, weight in weights.items()}
    error, checkpoint = None, open_checkpoint(Path(directory))
    try:
        restore(engine, weights, checkpoint, checkpoint.trainer["engine"])
    except CheckpointError as refused:
        error = str(refused)
    untouched = all(torch.equal(before[name], weight) for name, weight in weights.items())
    return error, untouched, tiny.take_step(groups, config, engine, steps, 3e-3)[0]


def everything(name, kind):
    return True


def weights_alone(name, kind):
    return kind == "weight"


def one_moment(name, kind):
    return kind != "exp_avg_sq"


def all_but_one(name, kind):
    return (name, kind) != ("layers.2.mlp.gate.weight", "exp_avg")


@pytest.mark.parametrize(
    ("kept", "counted", "words"),
    [
        (weights_alone, True, "holds no optimizer state of embedding.weight, but AdamW continues from exp_avg, "),
        (weights_alone, False, "holds no optimizer state of embedding.weight, but AdamW continues from exp_avg, "),
        (everything, False, "holds exp_avg, exp_avg_sq of embedding.weight, but AdamW continues from exp_avg, "),
        (one_moment, True, "holds exp_avg, step of embedding.weight, but AdamW continues from exp_avg, exp_avg_sq, "),
        (all_but_one, True, "holds exp_avg_sq, step of layers.2.mlp.gate.weight, but AdamW continues from "),
    ],
)
def test_a_state_that_is_not_the_optimizers_is_refused(tmp_path, kept, counted, words):
    error, untouched, _ = run_ranks(restored, 1, str(tmp_path), kept, counted)[0]
    assert error.startswith(f"{tmp_path}/global_step2: {words}") and "(--finetune)" in error
    assert untouched, "a refused checkpoint was loaded in part"


def test_before_the_first_step_there_is_no_state_and_none_is_needed(tmp_path):
    error, _, loss = run_ranks(restored, 1, str(tmp_path / "a"), everything, True, 0)[0]
    assert error is None
    assert loss == run_ranks(restored, 1, str(tmp_path / "b"), weights_alone, True, 0)[0][2]


# --- what changes ---------------------------------------------------------------------------------------------------

DROPOUT = {"model": {"hidden_dropout": 0.1}}
EXPERTS = {"moe": {"num_experts": 4, "moe_ffn_hidden_size": 16}}
JITTER = {"moe": EXPERTS["moe"] | {"moe_input_jitter_eps": 0.01}}
CAPACITY = {"moe": EXPERTS["moe"] | {"capacity": {"kind": "dynamic"}}}
SWITCH = {"moe": EXPERTS["moe"] | {"moe_aux_loss_coeff": 0.01}}
ATTENTION = {"model": {"attention_dropout": 0.1}}
STREAMS = "random streams start anew for ranks 2-3: the checkpoint was written by 2 ranks"
MASKS = "dropout masks are others: they are drawn per micro-batch, of 1 sequence instead of 2"
HEADS = "masks of attention dropout are others: they are drawn by each of 2 tensor-parallel ranks instead of 1"
TOKENS = "experts are balanced over other tokens: those of a micro-batch, of 1 sequence instead of 2"


@pytest.mark.parametrize(
    ("options", "ranks", "micro", "tensor", "lines"),
    [
        ({}, 4, 1, 2, []),
        (EXPERTS, 4, 1, 1, []),
        (DROPOUT, 2, 2, 1, []),
        (DROPOUT, 1, 2, 1, []),
        (DROPOUT, 4, 2, 2, [STREAMS]),
        (DROPOUT, 2, 1, 1, [MASKS]),
        (DROPOUT, 4, 1, 1, [STREAMS, MASKS]),
        (JITTER, 4, 1, 1, [STREAMS, MASKS]),
        (ATTENTION, 2, 2, 2, [HEADS]),
        (CAPACITY, 2, 1, 1, [TOKENS]),
        (SWITCH, 4, 1, 2, [TOKENS]),
    ],
)
def test_what_changes_is_said(options, ranks, micro, tensor, lines):
    from megatron_ds.engine.state import changed_on_load

    old = configuration(2, micro=2, **options)
    checkpoint = SimpleNamespace(config=old.model_dump(mode="json"), manifest=SimpleNamespace(world_size=2))
    assert changed_on_load(checkpoint, configuration(ranks, micro=micro, tp=tensor, **options)) == lines


def test_one_new_rank_is_named_alone():
    from megatron_ds.engine.state import changed_on_load

    checkpoint = SimpleNamespace(
        config=configuration(1, **DROPOUT).model_dump(mode="json"), manifest=SimpleNamespace(world_size=1)
    )
    [line] = changed_on_load(checkpoint, configuration(2, **DROPOUT))
    assert line == "random streams start anew for rank 1: the checkpoint was written by 1 rank"
