"""Every layout trains the same model: losses and gradient norms of pp, dp, ZeRO and precision against one rank.

Micro-batches have unequal numbers of counted targets: a mean over micro-batches, ranks or stages, instead of over the
counted tokens of the global batch, would show.
"""

import pytest
from ranks import run_ranks
from tiny import FEW, STEPS, assert_close, assert_learns, micro_batch_size, train, train_ranks


def run(world_size, steps=STEPS, **options):
    pp = options.get("pp", 1)
    return train_ranks(world_size, {"micro": micro_batch_size(world_size // pp, pp)} | options, steps)


@pytest.fixture(scope="module")
def one_rank():
    reference = run(1)
    assert_learns(reference)
    return reference


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_pipelines_are_bit_identical(pp, stage, tied):
    model = {"untie_embeddings_and_output_weights": not tied}
    assert run(pp, pp=pp, stage=stage, model=model) == run(1, micro=2, stage=stage, model=model)


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_data_parallel(one_rank, dp):
    assert_close(run(dp), one_rank, 1e-6)


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages(one_rank, stage, dp):
    assert_close(run(dp, stage=stage), one_rank, 1e-6)


def test_pipeline_with_data_parallel_and_zero(one_rank):
    assert_close(run(8, pp=4, stage=1), one_rank, 1e-6)
    assert_close(run(4, pp=2, stage=0), one_rank, 1e-6)


def test_micro_batching_does_not_change_the_loss(one_rank):
    assert_close(run(1, micro=1), one_rank, 1e-6)
    assert_close(run(2, micro=1, pp=2), one_rank, 1e-6)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_changes_nothing(granularity):
    training = {"recompute_granularity": granularity}
    model = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    assert run(2, FEW, pp=2, training=training, model=model) == run(2, FEW, pp=2, model=model)


@pytest.mark.parametrize("pp", [2, 4])
def test_dropout_masks_do_not_depend_on_the_pipeline(pp):
    model = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    with_dropout = run(1, micro=2, model=model)
    assert run(pp, pp=pp, model=model) == with_dropout
    assert with_dropout != run(1, micro=2)


@pytest.mark.parametrize("kind", ["full", "soft_gate"])
def test_other_attention_modes(kind):
    attention = {"kind": kind} if kind == "full" else {"kind": kind, "window": 5}
    model = {"attention": attention}
    assert run(2, FEW, pp=2, model=model) == run(1, FEW, micro=2, model=model)


def test_bf16_accumulates_in_fp32_and_follows_fp32(one_rank):
    """bf16 rounds weights and activations: the curve follows fp32 within its 3 digits, and layouts agree closely."""
    alone = run(1, micro=2, dtype="bf16", stage=1)
    assert_close(alone[:1], one_rank[:1], 3e-2)
    assert_close(run(2, pp=2, dtype="bf16", stage=1)[:1], alone[:1], 2e-3)
    assert_close(run(2, micro=2, dtype="bf16", stage=1)[:1], alone[:1], 2e-3)
    for stage in (2, 3):
        assert_close(run(2, micro=2, dtype="bf16", stage=stage)[:1], one_rank[:1], 3e-2)


def train_fp16(groups, options, steps):
    """As ``train``; PyTorch computes fp16 also on a CPU without instructions for it, where DeepSpeed does not start."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return train(groups, {"micro": 2, "dtype": "fp16", "stage": 1, **options}, steps)


def test_fp16_skips_overflows_and_learns():
    [(losses, norms, _)] = run_ranks(train_fp16, 1, {"loss_scale_power": 26}, 30)
    skipped = norms.count(float("inf"))
    assert 1 <= skipped < 15, "the first loss scales overflow, and their steps are skipped"
    assert losses[-1] < losses[0] - 0.1


def test_fp16_layouts_agree(one_rank):
    """fp16 has 11 bits of precision; without overflows all layouts follow fp32."""
    alone = run_ranks(train_fp16, 1, {}, STEPS)[0]
    piped = run_ranks(train_fp16, 2, {"pp": 2}, STEPS, parallel={"pipeline_model_parallel_size": 2})[0]
    parallel = run_ranks(train_fp16, 2, {}, STEPS)[0]
    for result in (alone, piped, parallel):
        assert float("inf") not in result[1]
        assert_close(result[:1], one_rank[:1], 2e-3)


def test_clipping_zero_is_off():
    _, norms, _ = run(1, micro=2, clipping=0.0, stage=1)
    losses, clipped, _ = run(2, pp=2, clipping=0.0, stage=1)
    assert norms == clipped and max(norms) > 1.0
    assert losses != run(1, micro=2, stage=1)[0]
