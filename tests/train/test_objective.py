"""Sums of losses against loops over positions."""

import pytest
import torch

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.data.loader import Batch
from megatron_ds.model.mtp import Losses
from megatron_ds.train.objective import pretraining

VOCABULARY = 13
MODEL = ModelConfig(vocab_size=VOCABULARY, make_vocab_size_divisible_by=16)


def batch(length, documents=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token_BS1 = torch.randint(VOCABULARY, (3, length + 1), generator=generator)
    counted_BS = torch.rand(3, length, generator=generator) < 0.7
    document_BS = torch.zeros(3, length, dtype=torch.int64) if documents is None else torch.tensor(documents)
    return Batch(token_BS1[:, :-1], token_BS1[:, 1:], counted_BS, document_BS, torch.zeros_like(document_BS))


def logits(rows, length):
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expected(logits_BSV, batch, depth=0):
    """Sum of -log p of the token ``depth + 1`` further, in documents that hold all inputs up to it."""
    total, length = 0.0, batch.token_BS.shape[1]
    for row in range(3):
        for i in range(length - depth):
            seen = {int(batch.document_BS[row, j]) for j in range(i, i + depth + 1)}
            if len(seen) == 1 and batch.counted_BS[row, i + depth]:
                total -= float(logits_BSV[row, i, :VOCABULARY].detach().log_softmax(0)[batch.label_BS[row, i + depth]])
    return total


DOCUMENTS = [[0, 0, 0, 1, 2, 2, 2, 2, 2], [0] * 9, [0, 1, 1, 2, 2, 3, 3, 3, 3]]


def test_the_next_token_alone():
    losses = pretraining(MODEL)(logits(3, 9), batch(9, DOCUMENTS))
    assert losses.main.item() == pytest.approx(expected(logits(3, 9), batch(9)), rel=1e-6), "whatever its document"
    assert losses.mtp is None and losses.total(0.3) is losses.main


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_tokens_further_ahead(depths, documents):
    all_logits, samples = logits(3 * (1 + depths), 9), batch(9, documents)
    main, *further = all_logits.split(3)
    losses = pretraining(MODEL)(all_logits, samples)
    assert losses.main.item() == pytest.approx(expected(main, samples), rel=1e-6)
    mtp = sum(expected(part, samples, depth) for depth, part in enumerate(further, 1)) / depths
    assert mtp > 1 and losses.mtp.item() == pytest.approx(mtp, rel=1e-6)
    assert losses.total(0.3).item() == pytest.approx(losses.main.item() + 0.3 * mtp, rel=1e-6)


def test_samples_too_short_for_a_depth():
    samples, all_logits = batch(2), logits(9, 2).requires_grad_()
    losses = pretraining(MODEL)(all_logits, samples)
    assert losses.mtp.item() == pytest.approx(expected(all_logits[3:6], samples, 1) / 2, rel=1e-6)
    losses.total(1.0).backward()
    assert all_logits.grad[:6].any() and not all_logits.grad[6:].any()


def test_nothing_counted_is_nothing_lost():
    samples, all_logits = batch(5), logits(6, 5).requires_grad_()
    samples.counted_BS.fill_(False)
    losses = pretraining(MODEL)(all_logits, samples)
    assert losses == Losses(torch.zeros(()), torch.zeros(()))
    losses.total(1.0).backward()
    assert not all_logits.grad.any()
