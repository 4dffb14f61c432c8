"""Reading in blocks: the same values as at once, from pages that are given back."""

from pathlib import Path

import pytest
import torch
from checkpoint_tools import DTYPES, any_bits, cut, fragments_of, requests, same_bits, splits
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.checkpoint import reader
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import CheckpointError


def save(directory, fragments):
    """A checkpoint of one rank."""
    CheckpointStore(directory, SingleProcess()).save(1, fragments, rank_state={}, trainer={}, config={})
    return open_checkpoint(directory)


def as_fragment(tensor):
    """A whole tensor in one piece."""
    (fragment,) = fragments_of(tensor)
    return fragment


def num_mapped():
    """Mappings of shards that this process has."""
    return Path("/proc/self/maps").read_text().count("/shard_")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), block=st.sampled_from([8, 24, 1 << 20]))
def test_any_range_is_read_in_blocks_of_any_size(tmp_path_factory, data, dtype, block):
    """However the tensor was cut when it was stored: a request of several blocks ends in the middle of rows."""
    shape = data.draw(st.sampled_from([(7, 5), (3, 4, 5), (29,), (2, 0), ()]))
    tensor = any_bits(shape, dtype, data.draw(st.integers(0, 9)))
    checkpoint = save(tmp_path_factory.mktemp("store"), data.draw(splits(tensor)))
    box, start, length = data.draw(requests(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_BYTES", block)
        values = checkpoint.read_range("w", "weight", box, start, length)
    assert same_bits(values, cut(tensor, box)[start : start + length])


def test_nothing_stays_mapped(tmp_path, monkeypatch):
    """Pages count as memory while a file is mapped: one block is at a time, and none afterwards."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1 << 12)
    tensor = any_bits((64, 256), torch.float32)
    checkpoint = save(tmp_path, [as_fragment(tensor)])
    seen, place = [], reader.place
    monkeypatch.setattr(reader, "place", lambda *arguments: (seen.append(num_mapped()), place(*arguments))[1])
    assert same_bits(checkpoint.read("w"), tensor)
    assert seen == [1] * 16 and num_mapped() == 0


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    checkpoint = save(tmp_path, [as_fragment(any_bits((9,), torch.float32))])
    checkpoint.shapes()
    (shard,) = checkpoint.path.glob("shard_*")
    shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard_00000_000\.safetensors: unreadable"):
        checkpoint.read("w")
