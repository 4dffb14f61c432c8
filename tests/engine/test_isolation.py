"""Documents packed into one sample never see each other, in any attention mode, on one and on two pipeline stages."""

import pytest
import torch
from ranks import run_ranks
from tiny import configuration, global_batch

MODES = {
    "full": {"kind": "full"},
    "hybrid": {"kind": "hybrid", "pattern": "LG", "window": 5},
    "lse": {"kind": "soft_gate", "window": 5, "implementation": "lse"},
    "bias": {"kind": "soft_gate", "window": 5, "implementation": "bias"},
}


def logits_of_two_batches(groups, mode):
    """Logits of a batch, and of the same batch with other tokens in every sample's first document."""
    from megatron_ds.data.loader import Batch
    from megatron_ds.engine.initialize import build_engine

    config = configuration(groups.world_size, pp=groups.world_size, model={"attention": MODES[mode]})
    seen = []

    def objective(logits, batch):
        seen.append(logits.detach().clone())
        return logits.sum()

    engine, _ = build_engine(config, groups, objective)
    before = global_batch(0, config.megatron_ds.model)
    first = before["document_BS"] == 0
    other = torch.where(first, (before["token_BS"] + 7) % config.megatron_ds.model.vocab_size, before["token_BS"])
    for batch in (before, before | {"token_BS": other}):
        engine.evaluate([Batch(**batch)])
    return (seen, first) if groups.is_last_stage else None


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_changing_a_document_leaves_the_others_bit_identical(mode, pp):
    (before, after), first = run_ranks(logits_of_two_batches, pp, mode, parallel={"pipeline_model_parallel_size": pp})[
        -1
    ]
    assert first.any() and (~first).any()
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])
