"""The vocabulary loss against torch's cross_entropy in double precision."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from megatron_ds.parallel import loss as vocabulary_loss
from megatron_ds.parallel.loss import cross_entropy_sum


def batch(tokens=37, padded=48, vocab=41, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(tokens, padded, generator=generator)).to(dtype).requires_grad_()
    label = torch.randint(vocab, (tokens,), generator=generator)
    return logits, label, torch.rand(tokens, generator=generator) < 0.7


def expected(logits, label, counted, vocab):
    exact = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(exact[:, :vocab], label.where(counted, torch.tensor(-100)), reduction="sum")
    return loss, torch.autograd.grad(3 * loss, exact)[0]


@pytest.mark.parametrize("vocab", [41, 48])
@pytest.mark.parametrize("chunk", [1, 7 * 48, 2**19])
def test_loss_and_gradient(monkeypatch, vocab, chunk):
    monkeypatch.setattr(vocabulary_loss, "CHUNK_ELEMENTS", chunk)
    logits, label, counted = batch(vocab=41)
    loss = cross_entropy_sum(logits, label, counted, vocab)
    want, want_gradient = expected(logits, label, counted, vocab)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    [gradient] = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5, atol=1e-6)
    assert not gradient[:, vocab:].any() and not gradient[~counted].any()


def test_labels_that_do_not_count_may_be_anything():
    logits, label, counted = batch()
    wild = label.where(counted, torch.tensor(-100))
    assert torch.equal(cross_entropy_sum(logits, wild, counted, 41), cross_entropy_sum(logits, label, counted, 41))


def test_nothing_counted():
    logits, label, counted = batch()
    loss = cross_entropy_sum(logits, label, torch.zeros_like(counted), 41)
    [gradient] = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not gradient.any()


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([1]), torch.tensor([True]), 3)
    [gradient] = torch.autograd.grad(loss, logits)
    assert loss.item() == 2e4
    assert torch.equal(gradient, torch.tensor([[1.0, -1.0, 0.0, 0.0]]))


def test_low_precision_logits_are_summed_in_fp32():
    logits, label, counted = batch(dtype=torch.bfloat16)
    loss = cross_entropy_sum(logits, label, counted, 41)
    want, want_gradient = expected(logits, label, counted, 41)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    [gradient] = torch.autograd.grad(3 * loss, logits)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=8e-3, atol=1e-6)


def on_own_columns(groups, logits, label, counted, vocab, chunk):
    vocabulary_loss.CHUNK_ELEMENTS = chunk
    ranks = groups.tensor
    mine = logits.chunk(ranks.size, 1)[ranks.index].clone().requires_grad_()
    loss = cross_entropy_sum(mine, label, counted, vocab, ranks)
    return loss.detach(), torch.autograd.grad(3 * loss, mine)[0]


def on_ranks(size, *arguments, chunk=2**19):
    """The loss, which is the same on all ranks, and the gradient of all columns."""
    results = run_ranks(on_own_columns, size, *arguments, chunk, parallel={"tensor_model_parallel_size": size})
    losses, gradients = zip(*results)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, losses[0]) for loss in losses)
    return losses[0], torch.cat(gradients, 1)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab", [48, 41, 36, 13])
def test_columns_of_many_ranks(size, vocab):
    """With 36 words four ranks have nothing but padding on the last, with 13 on two."""
    logits, label, counted = batch(vocab=min(vocab, 36))
    label = label % vocab
    wild = label.where(counted, torch.tensor(-100))
    want, want_gradient = expected(logits, label, counted, vocab)
    for chunk in (1, 7 * 48, 2**19):
        loss, gradient = on_ranks(size, logits.detach(), wild, counted, vocab, chunk=chunk)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5, atol=1e-6)
        assert not gradient[:, vocab:].any() and not gradient[~counted].any()


def test_columns_of_many_ranks_in_low_precision():
    logits, label, counted = batch(dtype=torch.bfloat16)
    loss, gradient = on_ranks(2, logits.detach(), label, counted, 41)
    want, want_gradient = expected(logits, label, counted, 41)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=8e-3, atol=1e-6)


def test_large_logits_on_many_ranks():
    logits = torch.tensor([[1e4, 0.0, -1e4, 0.0]])
    loss, gradient = on_ranks(2, logits, torch.tensor([2]), torch.tensor([True]), 3)
    assert loss.item() == 2e4 and torch.equal(gradient, torch.tensor([[3.0, 0.0, -3.0, 0.0]]))
    loss, gradient = on_ranks(2, logits, torch.tensor([2]), torch.tensor([False]), 3)
    assert loss.item() == 0 and not gradient.any()
