"""The node-local tier over real processes: four gloo ranks on two emulated nodes with a disk each."""

import shutil

import torch
from local_tools import all_of, on_any_disk, save_of, store_of, tensor_of
from ranks import run_ranks

from megatron_ds.checkpoint.fetch import CHUNK_BYTES
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.peers import NodePeers


def save_twice_and_fail(groups, root):
    store = store_of(root, NodePeers.build(ranks_per_node=2), neighbour=True)
    reports = [save_of(store, step, step) for step in (1, 2)]

    def disk_full():
        yield from ()
        if groups.rank == 2:
            raise OSError(28, "No space left on device")

    try:
        store.save(3, disk_full(), rank_state={}, trainer={}, config={})
    except CheckpointError as error:
        return [report.problems for report in reports], str(error)


def load(groups, root, ranks_per_node):
    store = store_of(root, NodePeers.build(ranks_per_node))
    steps, lines = store.steps()
    with store.open(steps[0], all_of) as checkpoint:
        whole = torch.equal(
            checkpoint.read("w", "exp_avg").view(torch.int32), tensor_of(2, "exp_avg").view(torch.int32)
        )
        return steps, lines, whole, checkpoint.trainer


def test_a_node_is_lost_and_comes_back_from_its_neighbour(tmp_path):
    results = run_ranks(save_twice_and_fail, 4, tmp_path)
    assert all(problems == [(), ()] for problems, _ in results)
    message = f"saving step 3 to {tmp_path}/disk failed: [Errno 28] No space left on device (rank 2)"
    assert set(on_any_disk(error for _, error in results)) == {f"{message}; earlier checkpoints are untouched"}
    shutil.rmtree(tmp_path / "disk1")
    assert run_ranks(load, 4, tmp_path, 2) == [([2, 1], [], True, {"value": 2})] * 4
    assert run_ranks(load, 4, tmp_path, 3) == [([2, 1], [], True, {"value": 2})] * 4, "three ranks and one"
    assert run_ranks(load, 2, tmp_path, 1) == [([2, 1], [], True, {"value": 2})] * 2
    assert not list(tmp_path.rglob("*.tmp"))


def copy_large(groups, root):
    """A file of more than one message, so that sends wait for their receives."""
    store = store_of(root, NodePeers.build(ranks_per_node=2), neighbour=True)
    numel = CHUNK_BYTES // 4 + 1000
    pieces = [
        Fragment(f"w{groups.rank}", "weight", (numel,), ((0, numel),), 0, torch.full((numel,), float(groups.rank)))
    ]
    report = store.save(1, pieces, rank_state={}, trainer={}, config={})
    return report.problems


def test_files_of_several_messages_are_copied_both_ways_at_once(tmp_path):
    assert run_ranks(copy_large, 4, tmp_path) == [()] * 4
    copies = sorted(tmp_path.glob("disk*/node*/neighbour/global_step1/shard*"))
    assert [path.name[:11] for path in copies] == ["shard_00002", "shard_00003", "shard_00000", "shard_00001"]
    assert all(path.stat().st_size > CHUNK_BYTES for path in copies)
