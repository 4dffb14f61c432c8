"""The tiled kernel against plain attention in double precision: outputs, log-sum-exps and every gradient."""

import pytest
import reference
import torch
import torch.nn.functional as F

from megatron_ds.model import tiled_attention as kernel
from megatron_ds.model.attention import fused_attention
from megatron_ds.model.attention_mask import Packing
from megatron_ds.model.tiled_attention import Dropout, tiled_attention

LENGTH = 149
PACKINGS = {"single": [[LENGTH], [LENGTH]], "packed": [[1, 70, 78], [64, 64, 21]]}


def inputs(heads=4, groups=2, width=16, batch=2, length=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, h, length, width) for h in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def document(packing):
    return reference.packed(PACKINGS[packing], LENGTH)[0]


def doubles(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_same(outputs, tensors, expected, doubles, tolerance=1e-5):
    """Outputs agree, and so do the gradients of a random scalar made of them."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in outputs]
    gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), tensors)
    wanted = torch.autograd.grad(sum((x * w).sum() for x, w in zip(expected, weights)), doubles)
    for got, want in zip([*outputs, *gradients], [*expected, *wanted]):
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 37, 64, 400])
@pytest.mark.parametrize("packing", PACKINGS)
def test_window_and_packing(packing, window):
    qkv = inputs()
    exact = doubles(qkv)
    out, lse = tiled_attention(*qkv, Packing(document(packing)), window=window, with_lse=True)
    assert_same([out, lse], qkv, reference.attention(*exact, reference.visible(document(packing), window)), exact)


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (6, 1)])
def test_grouped_heads(heads, groups):
    qkv = inputs(heads, groups)
    exact = doubles(qkv)
    out, lse = tiled_attention(*qkv, Packing(document("single")))
    assert lse is None
    assert_same([out], qkv, reference.attention(*exact, reference.visible(document("single")))[:1], exact)


@pytest.mark.parametrize(
    "attend", [lambda *x, **y: tiled_attention(*x, **y)[0], fused_attention], ids=["tiled", "fused"]
)
@pytest.mark.parametrize("packing", PACKINGS)
def test_scale_and_width_of_values(attend, packing):
    q, k, _ = inputs()
    v = inputs(width=10)[2]
    exact = doubles([q, k, v])
    out = attend(q, k, v, Packing(document(packing)), scale=0.6)
    expected = reference.attention(0.6 * 16**0.5 * exact[0], *exact[1:], reference.visible(document(packing)))[:1]
    assert_same([out], [q, k, v], expected, exact)


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_strides(packing):
    """Heads behind the sequence, as projections return them."""
    qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs()]
    exact = doubles(qkv)
    out, _ = tiled_attention(*qkv, Packing(document(packing)))
    assert_same([out], qkv, reference.attention(*exact, reference.visible(document(packing)))[:1], exact)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_lengths_around_a_tile(length):
    qkv = inputs(length=length)
    exact = doubles(qkv)
    documents = torch.zeros(2, length, dtype=torch.long)
    out, _ = tiled_attention(*qkv, Packing(documents), window=3)
    assert_same([out], qkv, reference.attention(*exact, reference.visible(documents, 3))[:1], exact)


@pytest.mark.parametrize("gate_window", [1, 40, 64, 200])
@pytest.mark.parametrize("packing", PACKINGS)
def test_gate_on_far_keys(packing, gate_window):
    qkv = inputs()
    log_gate = F.logsigmoid(torch.randn(2, 4, LENGTH, generator=torch.Generator().manual_seed(2))).requires_grad_()
    exact = doubles([*qkv, log_gate])
    out, _ = tiled_attention(*qkv, Packing(document(packing)), log_gate_BHS=log_gate, gate_window=gate_window)
    bias = exact[3][..., None] * reference.far(LENGTH, gate_window)
    expected = reference.attention(*exact[:3], reference.visible(document(packing)), bias)[:1]
    assert_same([out], [*qkv, log_gate], expected, exact)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("together", [1, 2, 3])
def test_some_heads_are_handled_together(monkeypatch, packing, together):
    qkv, documents = inputs(heads=8, groups=4), document(packing)
    all_at_once, _ = tiled_attention(*qkv, Packing(documents))
    largest = max(kernel._largest(tiles) for _, tiles in Packing(documents).tiles(None))
    rows = 2 if packing == "single" else 1
    monkeypatch.setattr(kernel, "CACHED_SCORES", together * rows * 2 * largest)
    some, _ = tiled_attention(*qkv, Packing(documents))
    torch.testing.assert_close(some, all_at_once, rtol=1e-6, atol=1e-6)
    exact = doubles(qkv)
    assert_same([some], qkv, reference.attention(*exact, reference.visible(documents))[:1], exact)


def test_dropout_is_the_same_in_both_passes():
    dropout, width = Dropout(0.3, seed=5), LENGTH
    q, k, v = inputs(width=width)
    packing = Packing(document("packed"))
    with torch.no_grad():  # with the unit matrix for values the output is the dropped probabilities
        unit = torch.eye(LENGTH).expand(2, 2, LENGTH, LENGTH)
        dropped = tiled_attention(q, k, unit, packing, window=60, dropout=dropout)[0]
        kept = tiled_attention(q, k, unit, packing, window=60)[0]
    ratio = torch.where(kept > 0, dropped / kept, 0)
    assert torch.equal(ratio > 0, dropped > 0)
    share = (dropped > 0).sum() / (kept > 0).sum()
    assert share == pytest.approx(0.7, abs=0.01)
    exact = doubles([q, k, v])
    keep = (dropped > 0).double() / 0.7
    expected = reference.attention(*exact, reference.visible(document("packed"), 60), keep_BHSS=keep)[:1]
    out = tiled_attention(q, k, v, packing, window=60, dropout=dropout)[0]
    assert_same([out], [q, k, v], expected, exact)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_rounds_only_inputs_and_outputs(dtype, tolerance):
    qkv = inputs(dtype=dtype)
    exact = doubles(qkv)
    out, lse = tiled_attention(*qkv, Packing(document("packed")), window=37, with_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = reference.attention(*exact, reference.visible(document("packed"), 37))
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert_same([out], qkv, expected[:1], exact, tolerance)


@pytest.mark.parametrize("packing", PACKINGS)
def test_fused_kernel_agrees(packing):
    qkv = inputs()
    exact = doubles(qkv)
    out = fused_attention(*qkv, Packing(document(packing)), dropout=None)
    assert_same([out], qkv, reference.attention(*exact, reference.visible(document(packing)))[:1], exact)
