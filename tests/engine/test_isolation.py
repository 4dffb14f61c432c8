"""Documents packed into one sample never see each other, in any attention mode, on any topology, also in training."""

import pytest
import torch
from ranks import run_ranks
from tiny import build, global_batch, parallel, take_step

MODES = {
    "full": {"kind": "full"},
    "hybrid": {"kind": "hybrid", "pattern": "LG", "window": 5},
    "lse": {"kind": "soft_gate", "window": 5, "implementation": "lse"},
    "bias": {"kind": "soft_gate", "window": 5, "implementation": "bias"},
    "latent": {"kind": "latent", "q_lora_rank": 20, "kv_lora_rank": 12, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4},
}
TOPOLOGIES = [
    {},
    {"pp": 2},
    {"tp": 2},
    {"tp": 4, "sp": True},
    {"pp": 2, "schedule": "interleaved"},
    {"tp": 2, "sp": True, "pp": 2, "schedule": "zb_v"},
    {"tp": 2, "sp": True, "pp": 2, "schedule": "interleaved"},
]


def options(mode):
    latent = {"num_query_groups": None, "qk_layernorm": False, "rotary_interleaved": True} if mode == "latent" else {}
    return {"attention": MODES[mode]} | latent


def logits_of_two_batches(groups, mode, layout):
    """Logits of a batch, and of the same batch with other tokens in every sample's first document."""
    from megatron_ds.data.loader import Batch
    from megatron_ds.model.mtp import Losses

    config, engine, _ = build(groups, {"model": options(mode), **layout})
    seen = []

    def objective(logits, batch):
        seen.append(logits.detach().clone())
        return Losses(logits.sum(), None)

    engine.objective = objective
    before = global_batch(0, config.megatron_ds.model)
    first = before["document_BS"] == 0
    other = torch.where(first, (before["token_BS"] + 7) % config.megatron_ds.model.vocab_size, before["token_BS"])
    for batch in (before, before | {"token_BS": other}):
        engine.evaluate([Batch(**batch)])
    return (seen, first) if seen else None


@pytest.mark.parametrize(
    ("mode", "layout"),
    [(mode, layout) for mode in MODES for layout in (TOPOLOGIES if mode in ("hybrid", "latent") else TOPOLOGIES[:3])],
    ids=str,
)
def test_changing_a_document_leaves_the_others_bit_identical(mode, layout):
    size = layout.get("tp", 1) * layout.get("pp", 1)
    results = run_ranks(logits_of_two_batches, size, mode, layout, parallel=parallel(**layout))
    held = [result for result in results if result]
    assert len(held) == layout.get("tp", 1), "every tensor rank of the last virtual stage has some columns"
    for (before, after), first in held:
        assert first.any() and (~first).any()
        assert torch.equal(before[~first], after[~first])
        assert not torch.equal(before[first], after[first])


def losses_of_a_step(groups, layout, changed):
    """Main and MTP loss of a step in which only the second documents' targets count."""
    from dataclasses import replace

    import tiny

    def of_the_second(config, groups, step, whole=tiny.micro_batches):
        batches = []
        for batch in whole(config, groups, step):
            first = batch.document_BS == 0
            other = torch.where(first, (batch.token_BS + 7) % config.megatron_ds.model.vocab_size, batch.token_BS)
            token = other if changed else batch.token_BS
            # The label at the first document's end is the second's first token: it stays.
            label = torch.cat([token[:, 1:], batch.label_BS[:, -1:]], dim=1)
            batches.append(replace(batch, token_BS=token, label_BS=label, counted_BS=batch.counted_BS & ~first))
        return batches

    config, engine, _ = build(groups, layout)
    original, tiny.micro_batches = tiny.micro_batches, of_the_second
    try:
        return take_step(groups, config, engine, 0, 0.0)
    finally:
        tiny.micro_batches = original


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True, "pp": 2, "schedule": "zb_v"}], ids=str)
def test_neither_does_training_with_mtp(layout):
    size = layout.get("tp", 1) * layout.get("pp", 1)
    more = {"model": options("latent") | {"mtp_num_layers": 2}, "stage": 1, **layout}
    one, other = (
        run_ranks(losses_of_a_step, size, more, changed, parallel=parallel(**layout))[0] for changed in (False, True)
    )
    assert one == other and min(one) > 0
