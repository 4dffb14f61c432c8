"""Saves to the nodes' disks that die or fail anywhere, on all nodes or on one: what was whole before stays whole.

A death of the job ends a forked child at its n-th file-system call. A death of one node makes each of its calls from
the n-th on raise what nothing catches, so it leaves its disk as it is; the others learn of it when they next meet. Each
test takes every few calls, beginning elsewhere.
"""

import os
import shutil
import threading
from functools import partial

import pytest
from checkpoint_tools import CRASHED, at_call, count_calls, die, fail, in_child, on_ranks
from local_tools import all_of, directories, found, save, store_of

from megatron_ds.checkpoint import fetch
from megatron_ds.errors import CheckpointError

STRIDE = 13


class NodeDied(BaseException):
    """Ends a rank, whatever it is doing."""


def node_dies():
    raise NodeDied


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """The calls are what matters; that they come in the right order is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Two disks with steps 1 and 2 of values 1 and 2, and their copies."""
    root = tmp_path_factory.mktemp("before")
    save(root, 1, 1, neighbour=True)
    save(root, 2, 2, neighbour=True)
    return root


def trials(two_steps, tmp_path, step, first, rank=None):
    """Numbers of calls, each with a copy of the two disks."""
    calls = count_calls(partial(save, shutil.copytree(two_steps, tmp_path / "counted"), step, 30, neighbour=True), rank)
    assert calls > 60
    for number in range(first, calls, STRIDE):
        yield number, shutil.copytree(two_steps, tmp_path / f"trial{number}")
        shutil.rmtree(tmp_path / f"trial{number}")


def assert_recovers(root, step):
    """What is there is in keeping, and the next save leaves no trace of the accident; whether the new one is there."""
    steps, _ = found(root)
    old = {2: 2, 1: 1}
    assert steps in (old, {**old, step: 30}, {2: 2, step: 30}), steps  # before, after; with what was not removed yet
    save(root, 4, 4, neighbour=True)
    newest = max(steps)
    assert found(root) == ({4: 4, newest: steps[newest]}, [])
    parts = {f"disk{node}/node{node}/global_step{kept}" for node in range(2) for kept in (newest, 4)}
    copies = {f"disk{node}/node{node}/neighbour/global_step{kept}" for node in range(2) for kept in (newest, 4)}
    there = set(directories(root))
    assert parts <= there <= parts | copies
    assert {path for path in copies if path.endswith("4")} <= there
    return steps[newest] == 30


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_the_job_dies_at_any_call(two_steps, tmp_path, step):
    outcomes = set()
    for number, root in trials(two_steps, tmp_path, step, 5 * step - 10):

        def child(root=root, number=number):
            at_call(number, die)
            save(root, step, 30, neighbour=True)

        assert in_child(child) == CRASHED
        outcomes.add(assert_recovers(root, step))
    assert outcomes == {False, True}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_one_node_dies_at_any_call(two_steps, tmp_path, step, rank):
    outcomes = set()
    for number, root in trials(two_steps, tmp_path, step, 2 * step + rank - 4, rank):

        def child(root=root, number=number):
            at_call(number, node_dies, rank, for_good=True)
            results = save(root, step, 30, neighbour=True)
            assert isinstance(results[rank], NodeDied)
            assert isinstance(results[1 - rank], threading.BrokenBarrierError), results

        assert in_child(child) == 0
        outcomes.add(assert_recovers(root, step))
    assert outcomes == {False, True}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_one_node_has_an_error_at_any_call(two_steps, tmp_path, step, rank):
    for number, root in trials(two_steps, tmp_path, step, 2 * step + rank + 3, rank):

        def child(root=root, number=number):
            at_call(number, fail, rank)
            first, second = save(root, step, 30, neighbour=True)
            assert type(first) is type(second)
            if isinstance(first, CheckpointError):
                assert "No space left on device" in str(first) and str(first).endswith("untouched")
                assert found(root) == ({2: 2, 1: 1}, [])
                assert directories(root) == directories(two_steps)
            else:
                assert found(root)[0][step] == 30
                assert len(first.problems) == len(second.problems) <= 2
            assert_recovers(root, step)

        assert in_child(child) == 0, f"call {number}"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_copy_that_fails_is_told_and_costs_nothing_else(two_steps, tmp_path, monkeypatch, failing):
    root, append = shutil.copytree(two_steps, tmp_path / "run"), fetch._append

    def full(path, byte_N):
        if f"node{failing}/neighbour/" in str(path) and path.name.startswith("shard"):
            fail()
        append(path, byte_N)

    monkeypatch.setattr(fetch, "_append", full)
    first, second = save(root, 3, 3, neighbour=True)
    assert first.problems == second.problems and first.bytes == second.bytes > 0
    name = f"shard_0000{1 - failing}_000.safetensors"
    assert first.problems == (
        f"copying global_step3 to the neighbours failed: {name}: [Errno 28] No space left on device (rank {failing})",
    )
    assert found(root) == ({3: 3, 2: 2}, [])
    assert [path for path in directories(root) if "step3" in path] == [f"disk{n}/node{n}/global_step3" for n in (0, 1)]
    monkeypatch.undo()
    assert [report.problems for report in save(root, 4, 4, neighbour=True)] == [(), ()]
    shutil.rmtree(root / f"disk{failing}")
    assert found(root)[0] == {4: 4}


def test_a_death_while_reading_leaves_what_the_next_run_clears(two_steps, tmp_path):
    root = shutil.copytree(two_steps, tmp_path / "run")

    def child():
        def work(peers):
            store = store_of(root, peers)
            store.steps()
            with store.open(2, all_of):
                peers.gather_objects(None)
                die()

        on_ranks([1, 1], work)

    assert in_child(child) == CRASHED
    assert any(path.endswith("opened.tmp") for path in directories(root))
    assert found(root) == ({2: 2, 1: 1}, [])
    assert directories(root) == directories(two_steps)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    log, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(f"named {b}"), rename(a, b))[1])
    save(tmp_path, 1, 1, neighbour=True)
    for node in range(2):
        home = tmp_path / f"disk{node}/node{node}"
        for final in (home / "global_step1", home / "neighbour/global_step1"):
            files = {f"{final}.tmp/{path.name}" for path in final.iterdir()}
            before = log[: log.index(f"named {final}")]
            assert files | {f"{final}.tmp"} <= set(before)
            last = max(position for position, entry in enumerate(before) if entry in files)
            assert f"{final}.tmp" in before[last:]
            assert str(final.parent) in log[len(before) :]
