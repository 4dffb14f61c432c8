"""Runs whose nodes have disks of their own: folders disk0, disk1 ... of one directory, each seen by one node only."""

import re
from pathlib import Path

import torch
from checkpoint_tools import any_bits, fragments_of, on_ranks, same_bits

from megatron_ds.checkpoint.local import LocalStore

SHAPE = (7, 5)
KINDS = ("weight", "exp_avg")


def tensor_of(value, kind="weight"):
    """What a save with ``value`` holds."""
    return any_bits(SHAPE, torch.float32, seed=2 * value + KINDS.index(kind))


def store_of(root, peers, disks=None, **options):
    """The store of a rank whose node has disk ``disks[node]``, by default that of its number."""
    return LocalStore(Path(root) / f"disk{disks[peers.node] if disks else peers.node}", peers, **options)


def save_of(store, step, value, **options):
    """Save this rank's part of the tensors of ``value``."""
    peers = store.peers
    fragments = [fragments_of(tensor_of(value, kind), "w", kind, parts=peers.world_size)[peers.rank] for kind in KINDS]
    arguments = {"rank_state": {"torch": torch.tensor([peers.rank, value])}, "trainer": {"value": value}, "config": {}}
    return store.save(step, fragments, **{**arguments, **options})


def save(root, step, value, world=(1, 1), disks=None, extra_files=None, **options):
    """Save on all ranks; the reports or errors in rank order."""
    extras = {"extra_files": extra_files} if extra_files else {}
    return on_ranks(world, lambda peers: save_of(store_of(root, peers, disks, **options), step, value, **extras))


def all_of(checkpoint):
    """Every shard: the needs of a rank that reads everything."""
    return {file for kind in KINDS for file in checkpoint.overlapping("w", kind, ((0, 7), (0, 5)), 0, 35)}


def value_in(store, step):
    """The value of a step, which this rank reads as a whole and compares bit for bit."""
    with store.open(step, all_of) as checkpoint:
        value = checkpoint.trainer["value"]
        assert checkpoint.step == step and checkpoint.config == {}
        assert all(same_bits(checkpoint.read("w", kind), tensor_of(value, kind)) for kind in KINDS)
    return value


def on_any_disk(lines):
    """Messages without the disk of the rank that was told them: on real nodes all have the same path."""
    return [re.sub(r"disk\d+", "disk", line) for line in lines]


def found(root, world=(1, 1), disks=None):
    """({step: value}, lines), newest step first: what every rank finds and can read."""

    def work(peers):
        store = store_of(root, peers, disks)
        steps, lines = store.steps()
        return {step: value_in(store, step) for step in steps}, on_any_disk(lines)

    results = on_ranks(world, work)
    assert all(type(result) is tuple for result in results), results
    assert all(result == results[0] and list(result[0]) == list(results[0][0]) for result in results)
    return results[0]


def directories(root):
    """All directories of parts, whatever state they are in, and whatever else is beside them."""
    paths = [*Path(root).glob("disk*/node*/*"), *Path(root).glob("disk*/node*/neighbour/*")]
    return sorted(path.relative_to(root).as_posix() for path in paths if path.name != "neighbour")
