"""Saves that die or fail anywhere: the checkpoints before them stay, and the next save works.

Real deaths: a forked child leaves at its n-th file-system call, or is killed at a random moment. Real errors: the n-th
call raises, or the kernel refuses to let files grow. Python's audit events see every open, mkdir, rename and removal.
"""

import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_tools import CRASHED, at_call, count_calls, die, fail, fragments_of, in_child, on_ranks

from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import CheckpointError


def save(directory, step, value, numel=50):
    """One rank's save of a tensor full of ``value``, with an extra file."""
    fragments = fragments_of(torch.full((numel,), float(value)), parts=3)
    store = CheckpointStore(directory, SingleProcess(), max_file_bytes=max(100, numel))
    options = {"rank_state": {"torch": torch.arange(3)}, "trainer": {"value": value}, "config": {}}
    return store.save(step, fragments, **options, extra_files={"tokenizer/t.py": Path(__file__)})


def found(directory):
    """(step, value) of the newest checkpoint; its content must be in keeping."""
    checkpoint = CheckpointStore(directory, SingleProcess()).newest()
    value = checkpoint.trainer["value"]
    assert checkpoint.read("w").eq(value).all()
    return checkpoint.step, value


@pytest.fixture
def two_steps(tmp_path):
    """A directory with steps 1 and 2 of values 1 and 2."""
    save(tmp_path / "before", 1, 1)
    save(tmp_path / "before", 2, 2)
    return tmp_path / "before"


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_death_at_every_call(two_steps, tmp_path, step):
    calls = count_calls(partial(save, shutil.copytree(two_steps, tmp_path / "counted"), step, 30))
    assert calls > 50
    outcomes = []
    for number in range(calls):
        directory = shutil.copytree(two_steps, tmp_path / f"crash{number}")

        def child(directory=directory, number=number):
            at_call(number, die)
            save(directory, step, 30)

        assert in_child(child) == CRASHED
        outcomes.append(found(directory))
        save(directory, 4, 4)
        assert found(directory) == (4, 4)
        assert open_checkpoint(directory / "global_step1").step == 1
        assert open_checkpoint(directory / "global_step2").trainer["value"] in ((2, 30) if step == 2 else (2,))
        assert not [path.name for path in directory.iterdir() if path.suffix in (".tmp", ".old") and path.is_dir()]
        shutil.rmtree(directory)
    assert set(outcomes) == {(2, 2), (step, 30)}
    assert outcomes == sorted(outcomes), "the new one, once there, went away again"


def test_death_while_tidying_up_after_a_death(two_steps, tmp_path):
    """A save died between setting the old step aside and replacing it; the next dies at every call of its own."""
    (two_steps / "global_step2").rename(two_steps / "global_step2.old")
    shutil.copytree(two_steps / "global_step1", two_steps / "global_step2.tmp")
    assert found(two_steps) == (2, 2)
    for number in range(count_calls(partial(save, shutil.copytree(two_steps, tmp_path / "counted"), 3, 3))):
        directory = shutil.copytree(two_steps, tmp_path / f"crash{number}")

        def child(directory=directory, number=number):
            at_call(number, die)
            save(directory, 3, 3)

        assert in_child(child) == CRASHED
        assert found(directory) in ((2, 2), (3, 3))
        save(directory, 4, 4)
        assert open_checkpoint(directory / "global_step2").trainer["value"] == 2
        assert not [path.name for path in directory.iterdir() if path.suffix in (".tmp", ".old") and path.is_dir()]
        shutil.rmtree(directory)


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_error_at_every_call(two_steps, tmp_path, step):
    for number in range(count_calls(partial(save, shutil.copytree(two_steps, tmp_path / "counted"), step, 30))):
        directory = shutil.copytree(two_steps, tmp_path / f"error{number}")

        def child(directory=directory, number=number):
            at_call(number, fail)
            try:
                save(directory, step, 30)
            except CheckpointError as error:
                assert "No space left on device" in str(error) and "untouched" in str(error)
            else:  # only tidying up after the commit may fail without a word
                assert found(directory) == (step, 30)
            assert not list(directory.glob("global_step*.tmp"))
            assert found(directory) in ((2, 2), (step, 30))
            save(directory, 4, 4)
            assert found(directory) == (4, 4)
            assert open_checkpoint(directory / "global_step1").step == 1

        assert in_child(child) == 0, f"call {number}"
        shutil.rmtree(directory)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut keeps: every file, then the folders that name them, then the rename, then the pointers."""
    log, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("named"), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"pointed {Path(b).name}"), replace(a, b))[1])
    save(tmp_path, 1, 1)
    temporary = str(tmp_path / "global_step1.tmp")
    named = log.index("named")
    files = [p.relative_to(tmp_path / "global_step1") for p in (tmp_path / "global_step1").rglob("*") if p.is_file()]
    folders = [temporary, f"{temporary}/tokenizer"]
    assert sorted(log[:named]) == sorted([*(f"{temporary}/{name}" for name in files), *folders])
    assert all(log.index(folder) > log.index(f"{temporary}/{name}") for folder in folders for name in files)
    assert log[named + 1 :] == [
        str(tmp_path), f"{tmp_path}/latest.tmp", "pointed latest", str(tmp_path),
        f"{tmp_path}/latest_checkpointed_iteration.txt.tmp", "pointed latest_checkpointed_iteration.txt", str(tmp_path),
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [1, 300, 1000, 2000, 3000])
def test_a_disk_that_refuses_to_take_more(two_steps, limit):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"saving .*global_step3 failed: .*File too large.* untouched"):
            save(two_steps, 3, 3, numel=1000)
        assert found(two_steps) == (2, 2) and not list(two_steps.glob("*.tmp"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(two_steps, 3, 3, numel=1000)
        assert found(two_steps) == (3, 3)

    assert in_child(child) == 0


def test_killed_at_random_moments(tmp_path):
    chance, last = random.Random(0), 0
    for _ in range(15):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(last + 1, last + 1000):
                save(tmp_path, step, step, numel=20_000)
                os.write(write, b".")
            os._exit(0)
        os.read(read, 1)  # one save is through; the next ones run into the kill
        time.sleep(0.06 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        before, (last, value) = last, found(tmp_path)
        assert last == value > before
        assert CheckpointStore(tmp_path, SingleProcess()).newest().rejected in (
            [],  # or it died just before the pointer moved on
            [f"{tmp_path}/global_step{last + 1}: beyond step {last}, which {tmp_path}/latest names"],
        )


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_fails_in_any_way_and_all_say_so(tmp_path, failing):
    reasons = [OSError(5, "Input/output error"), RuntimeError("CUDA error"), MemoryError(), ValueError("bad fragment")]

    def work(peers):
        store, messages = CheckpointStore(tmp_path, peers), []
        part = fragments_of(torch.full((9,), 1.0), parts=3)[peers.rank]
        for reason in reasons:

            def produce(reason=reason):
                yield part
                if peers.rank == failing:
                    raise reason

            with pytest.raises(CheckpointError) as caught:
                store.save(1, produce(), rank_state={}, trainer={}, config={})
            messages.append(str(caught.value))
        store.save(1, [part], rank_state={}, trainer={}, config={})
        return messages

    results = on_ranks(3, work)
    assert results[0] == results[1] == results[2]
    for message, reason in zip(results[0], reasons):
        assert (str(reason) or "MemoryError()") in message and f"(rank {failing})" in message
    assert open_checkpoint(tmp_path).step == 1
    assert not list(tmp_path.glob("*.tmp"))
