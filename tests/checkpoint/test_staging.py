"""Staging: copies that stay right while the source changes, in memory that is taken once."""

import pytest
import torch
from checkpoint_tools import DTYPES, any_bits, fragments_of, same_bits

from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.staging import Staging


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_have_the_bits_and_do_not_follow_the_source(dtype):
    tensors = [any_bits(shape, dtype, seed) for seed, shape in enumerate([(5, 7), (1,), (0,), (), (3, 1, 2)])]
    kept = [tensor.clone() for tensor in tensors]
    fragments = [part for n, t in enumerate(tensors) for part in fragments_of(t, name=f"w{n}", parts=2)]
    copies = Staging().hold(fragments)
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).fill_(1)
    expected = [part for n, t in enumerate(kept) for part in fragments_of(t, name=f"w{n}", parts=2)]
    for copy, fragment in zip(copies, expected, strict=True):
        assert copy.piece == fragment.piece
        assert same_bits(copy.tensor, fragment.tensor)


def test_gaps_in_the_source_are_no_gaps_in_the_copy():
    tensor = torch.arange(10.0)[::2]
    (copy,) = Staging().hold([Fragment("w", "weight", (5,), ((0, 5),), 0, tensor)])
    assert copy.tensor.is_contiguous() and torch.equal(copy.tensor, tensor)


def test_the_memory_is_used_again_and_grows():
    staging = Staging()
    first = staging.hold(fragments_of(torch.zeros(100)))[0].tensor.data_ptr()
    assert staging.hold(fragments_of(torch.ones(90)))[0].tensor.data_ptr() == first
    larger = staging.hold(fragments_of(torch.full((5000,), 2.0), parts=3))
    assert torch.equal(torch.cat([part.tensor for part in larger]), torch.full((5000,), 2.0))
