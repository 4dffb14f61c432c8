"""Streamed safetensors files, read back with the safetensors library."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ds.checkpoint.pieces import volume, whole
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf import writer
from megatron_ds.hf.options import parse_size
from megatron_ds.hf.plan import Entry
from megatron_ds.hf.writer import plan_shards, write_weights

SHAPES = {"a": (7, 3), "b": (5,), "c": (9, 3), "d": (1, 1)}
WEIGHTS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def entries(precision="fp32"):
    return [Entry(f"hf.{name}", name, whole(shape), shape, precision, precision) for name, shape in SHAPES.items()]


def reading(weights=WEIGHTS):
    """The values of a part of a tensor, flattened, as a checkpoint gives them."""
    return lambda name, box: weights[name][tuple(slice(*ends) for ends in box)].flatten()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_one_file_holds_every_tensor_cast_once(tmp_path, precision, dtype):
    write_weights(tmp_path, entries(precision), reading(), 1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == {f"hf.{name}" for name in SHAPES}
    for name, weight in WEIGHTS.items():
        assert loaded[f"hf.{name}"].dtype == dtype
        assert torch.equal(loaded[f"hf.{name}"], weight.to(dtype))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_the_same_tensors_and_an_index(tmp_path):
    write_weights(tmp_path, entries(), reading(), 104)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(weight.numel() for weight in WEIGHTS.values())
    assert index["metadata"] == {"total_size": 4 * total, "total_parameters": total}
    for name, weight in WEIGHTS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][f"hf.{name}"])[f"hf.{name}"], weight)


def test_a_shard_is_as_full_as_it_may_be_and_a_large_tensor_stands_alone():
    def sources(limit):
        return [[entry.source for entry in shard] for shard in plan_shards(entries(), limit)]

    assert sources(84 + 20) == [["a", "b"], ["c"], ["d"]]
    assert sources(84 + 20 - 1) == [["a"], ["b"], ["c"], ["d"]]
    assert sources(84 + 20 + 108) == [["a", "b", "c"], ["d"]]
    assert sources(1) == [["a"], ["b"], ["c"], ["d"]]


def test_an_entry_is_a_part_of_a_tensor_in_a_shape_and_precision_of_its_own(tmp_path):
    parts = [
        Entry("rows", "a", ((2, 5), (0, 3)), (3, 3), "bf16", "bf16"),
        Entry("row", "b", ((0, 5),), (1, 5), "fp32", "fp32"),
        Entry("nothing", None, ((0, 2),), (1, 2), "fp16", "fp16"),
        Entry("rounded", "c", ((8, 9), (0, 3)), (1, 3), "fp32", "bf16"),
    ]
    write_weights(tmp_path, parts, reading(), 36)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 18 + 20 + 4 + 12, "total_parameters": 9 + 5 + 2 + 3}
    loaded = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert torch.equal(loaded["rows"], WEIGHTS["a"][2:5].bfloat16())
    assert torch.equal(loaded["row"], WEIGHTS["b"][None])
    assert torch.equal(loaded["rounded"], WEIGHTS["c"][8:].bfloat16().float())
    assert torch.equal(loaded["nothing"], torch.zeros(1, 2, dtype=torch.float16))


def test_one_tensor_is_alive_at_a_time(tmp_path):
    """When a tensor is read, the one before has been let go."""
    alive = []

    def read(name, box):
        assert not alive or alive[-1]() is None
        tensor = WEIGHTS[name].flatten().clone()
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path, entries("bf16"), read, 1 << 30)
    assert len(alive) == len(SHAPES)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_a_tensor_in_parts_is_the_same_tensor(tmp_path, monkeypatch, limit):
    """Whatever a part may hold: rows, part of a row, one element; of one expert of a stack, too."""
    monkeypatch.setattr(writer, "MAX_PART", limit)
    stack = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(2))
    expert = Entry("expert", "stack", ((1, 2), (0, 1), (0, 5), (0, 3)), (5, 3), "fp32", "fp32")
    whole_read, sizes = reading(WEIGHTS | {"stack": stack}), []

    def read(name, box):
        sizes.append(volume(box))
        return whole_read(name, box)

    write_weights(tmp_path, [*entries(), expert], read, 1 << 30)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[f"hf.{name}"], weight) for name, weight in WEIGHTS.items())
    assert torch.equal(loaded["expert"], stack[1, 0]) and max(sizes) <= limit


@pytest.mark.parametrize(
    ("value", "precision", "fix"),
    [(float("nan"), "fp32", "use an earlier checkpoint"), (1e5, "fp16", "export with --dtype bf16 or fp32")],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, precision, fix):
    weights = WEIGHTS | {"c": torch.full((9, 3), value)}
    with pytest.raises(CheckpointError, match=f"c: holds values that are not finite in {precision}; {fix}"):
        write_weights(tmp_path, entries(precision), reading(weights), 1 << 30)


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("500 MB", 5 * 10**8), ("1.5kib", 1536), ("77", 77)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 apples", "GiB", "-1GB", "0"])
def test_bad_sizes(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
