"""Cutting and joining: any split, asked for by any other, gives the same bits."""

import pytest
import torch
from checkpoint_tools import SHAPES, any_bits, cut, fragments_of, requests, same_bits, splits
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.checkpoint.pieces import Fragment, Piece, covered, place, shared_runs, whole


def join(want, fragments, dtype):
    values, filled = torch.zeros(want.length, dtype=dtype), torch.zeros(want.length, dtype=torch.bool)
    agrees = [place(values, filled, want, fragment.tensor, fragment.piece) for fragment in fragments]
    return values, filled, all(agrees)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_range_of_any_box_from_any_split(data):
    shape = data.draw(SHAPES)
    tensor = any_bits(shape, torch.bfloat16)
    fragments = data.draw(splits(tensor))
    box, start, length = data.draw(requests(shape))
    values, filled, agrees = join(Piece("w", "weight", shape, box, start, length), fragments, tensor.dtype)
    assert agrees and filled.all()
    assert same_bits(values, cut(tensor, box)[start : start + length])
    assert covered([fragment.piece for fragment in fragments]) == tensor.numel()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_missing_fragment_is_a_gap_where_it_was(data):
    tensor = any_bits(data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7))), torch.float32)
    fragments = data.draw(splits(tensor))
    lost = data.draw(st.sampled_from(fragments))
    kept = [fragment for fragment in fragments if fragment is not lost]
    shape = tuple(tensor.shape)
    _, filled, _ = join(Piece("w", "weight", shape, whole(shape), 0, tensor.numel()), kept, tensor.dtype)
    expected = torch.ones(shape, dtype=torch.bool)
    part = expected[tuple(slice(lo, hi) for lo, hi in lost.box)]
    hole = torch.ones(part.numel(), dtype=torch.bool)
    hole[lost.start : lost.start + lost.tensor.numel()] = False
    part.copy_(hole.view(part.shape))
    assert torch.equal(filled.view(shape), expected)
    assert covered([fragment.piece for fragment in kept]) == tensor.numel() - lost.tensor.numel()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shared_runs_are_what_a_request_needs_of_a_piece(data):
    shape = data.draw(SHAPES)
    box, start, length = data.draw(requests(shape))
    want = Piece("w", "weight", shape, box, start, length)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for have in data.draw(splits(numbers)):
        runs = [have.tensor[first : first + count] for first, count in shared_runs(want, have.piece)]
        assert all(run.numel() for run in runs)
        wanted = set(cut(numbers, box)[start : start + length].tolist())
        assert sorted(number for run in runs for number in run.tolist()) == sorted(wanted & set(have.tensor.tolist()))


def test_a_second_copy_must_have_the_same_bits():
    tensor = any_bits((5, 3), torch.float32)
    want = Piece("w", "weight", (5, 3), whole((5, 3)), 0, 15)
    halves = fragments_of(tensor, parts=2)
    column = Fragment("w", "weight", (5, 3), ((0, 5), (1, 2)), 0, cut(tensor, ((0, 5), (1, 2))))
    assert join(want, [*halves, column, *halves], tensor.dtype)[2]
    for position in range(5):
        raw = column.tensor.clone()
        raw.view(torch.int32)[position] ^= 1 << 22  # may turn one NaN into another
        other = Fragment("w", "weight", (5, 3), column.box, 0, raw)
        assert not join(want, [*halves, other], tensor.dtype)[2]


def test_covered_counts_duplicates_once():
    pieces = [fragment.piece for fragment in fragments_of(torch.zeros(7), parts=3)]
    assert covered(pieces) == covered(pieces + pieces) == 7
    assert covered([*pieces, Piece("w", "weight", (7,), ((0, 7),), 1, 5)]) == 7
    assert covered(pieces[1:]) == 4 and covered([]) == 0


@pytest.mark.parametrize(
    ("box", "start", "length", "reason"),
    [
        (((0, 3),), 0, 3, "not inside the shape"),
        (((0, 2), (0, 4)), 0, 1, "not inside the shape"),
        (((2, 1), (0, 3)), 0, 0, "not inside the shape"),
        (((-1, 1), (0, 3)), 0, 1, "not inside the shape"),
        (((0, 2), (1, 3)), 3, 2, "not inside the 4 elements"),
        (((0, 2), (1, 3)), -1, 2, "not inside the 4 elements"),
    ],
)
def test_impossible_places_are_refused(box, start, length, reason):
    with pytest.raises(ValueError, match=rf"exp_avg of w: .*{reason}"):
        Piece("w", "exp_avg", (2, 3), box, start, length)
    with pytest.raises(ValueError):
        Fragment("w", "exp_avg", (2, 3), box, start, torch.zeros(length))


def test_a_fragment_is_flat():
    with pytest.raises(ValueError, match="1-D"):
        Fragment("w", "weight", (2, 3), ((0, 2), (0, 3)), 0, torch.zeros(2, 3))
