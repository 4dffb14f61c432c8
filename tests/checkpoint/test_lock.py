"""One owner at a time, whatever dies, stops or races; dead owners on this host are never in the way."""

import itertools
import json
import os
import random
import signal
import socket
import time
from contextlib import contextmanager

import pytest
import torch
from checkpoint_tools import fragments_of

from megatron_ds.checkpoint import lock as lock_module
from megatron_ds.checkpoint.lock import DirectoryLock, Owner
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import ConfigError

ME = Owner.this_process()


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 20 ms, death after a second without."""
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.01)


@contextmanager
def another_owner(directory, host=None):
    """A process that holds the lock, perhaps on ``host``; its pid, and a way to ask whether it still holds it."""
    answers, write = os.pipe()
    read, questions = os.pipe()
    child = os.fork()
    if child == 0:
        if host:
            socket.gethostname = lambda: host
        lock = DirectoryLock(directory)
        lock.acquire()
        while True:
            os.write(write, b"y" if lock.held else b"n")
            os.read(read, 1)

    def still_held():
        os.write(questions, b"?")
        return os.read(answers, 1) == b"y"

    try:
        assert os.read(answers, 1) == b"y"
        yield child, still_held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for descriptor in (answers, write, read, questions):
            os.close(descriptor)


def plant(directory, number=1, **changes):
    """A lock file of ``ME``, but for the changes."""
    path = directory / f".lock.{number}"
    path.write_text(json.dumps(ME.model_dump() | changes))
    return path


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_one_owner_after_the_other(tmp_path):
    first, second = DirectoryLock(tmp_path / "new" / "dir"), DirectoryLock(tmp_path / "new" / "dir", "wait")
    first.acquire()
    assert first.held and not second.held
    assert Owner.model_validate_json((first.directory / ".lock.1").read_text()) == ME
    with pytest.raises(ConfigError) as caught:
        second.acquire()
    assert str(caught.value) == (
        f"{first.directory} is in use by pid {os.getpid()} on host {socket.gethostname()} "
        f"(last sign of life 0 s ago); stop that job or wait"
    )
    assert names(first.directory) == [".lock.1"]
    first.release()
    assert not first.held
    second.acquire()
    assert second.held and names(first.directory) == [".lock.2"]
    with pytest.raises(ConfigError):
        first.acquire()
    second.release()
    second.release()
    first.acquire()
    assert first.held and not second.held
    first.release()


def test_a_killed_owner_on_this_host_is_never_in_the_way(tmp_path):
    lock = DirectoryLock(tmp_path)
    with another_owner(tmp_path) as (pid, _):
        with pytest.raises(ConfigError, match=f"in use by pid {pid} on host"):
            lock.acquire()
        os.kill(pid, signal.SIGKILL)
        while lock_module._process_start(pid) != "":  # a zombie from then on, as nobody has waited for it
            time.sleep(0.001)
        began = time.monotonic()
        lock.acquire()
        assert time.monotonic() - began < 2 and lock.held
    lock.release()


def test_a_stopped_owner_on_this_host_is_alive(tmp_path, quick):
    with another_owner(tmp_path) as (pid, still_held):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2 * lock_module.STALE_SECONDS)
        with pytest.raises(ConfigError, match=r"in use by pid .* \(last sign of life [1-9]"):
            DirectoryLock(tmp_path).acquire()
        os.kill(pid, signal.SIGCONT)
        assert still_held()


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"process_started": "17"}], ids=["gone", "another process"])
def test_an_owner_that_is_no_more_on_this_host(tmp_path, changes):
    plant(tmp_path, 4, **changes)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert lock.held and names(tmp_path) == [".lock.5"]
    lock.release()


@pytest.mark.parametrize("key", ["host", "boot", "pid_namespace"])
def test_a_pid_of_elsewhere_says_nothing_here(tmp_path, quick, key, capsys):
    """It is watched until it has shown no sign of life for long enough, by the clock of the file system."""
    path = plant(tmp_path, **{key: "elsewhere", "pid": 1})
    lock, began = DirectoryLock(tmp_path), time.monotonic()
    lock.acquire()
    assert time.monotonic() - began >= 0.99
    assert "pid 1 on host" in capsys.readouterr().err
    assert lock.held and not path.exists()
    lock.release()


def test_an_owner_elsewhere_that_shows_life_is_refused_and_a_silent_one_replaced(tmp_path, quick):
    lock = DirectoryLock(tmp_path)
    with another_owner(tmp_path, host="elsewhere") as (pid, still_held):
        time.sleep(1.2 * lock_module.STALE_SECONDS)
        with pytest.raises(ConfigError, match=f"in use by pid {pid} on host elsewhere"):
            lock.acquire()
        assert still_held()
        os.kill(pid, signal.SIGSTOP)
        lock.acquire()
        os.kill(pid, signal.SIGCONT)
        assert not still_held(), "it did not notice that another took over while it was stopped"
        time.sleep(5 * lock_module.HEARTBEAT_SECONDS)
        assert lock.held and names(tmp_path) == [".lock.2"]
        with pytest.raises(ConfigError):
            DirectoryLock(tmp_path).acquire()
    lock.release()


def test_a_disk_that_hesitates_does_not_end_the_heartbeat(tmp_path, quick, monkeypatch):
    lock, utime = DirectoryLock(tmp_path), os.utime
    lock.acquire()

    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "utime", refuse)
    time.sleep(0.1)
    monkeypatch.setattr(os, "utime", utime)
    before, deadline = (tmp_path / ".lock.1").stat().st_mtime_ns, time.monotonic() + 20
    while (tmp_path / ".lock.1").stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lock.held
    (tmp_path / ".lock.1").unlink()
    assert not lock.held
    lock.release()


def test_of_many_takers_one_wins(tmp_path):
    """Processes that all find the same stale lock at the same moment, round after round."""
    for number in range(1, 13):
        plant(tmp_path, number, process_started="17")
        go, start = os.pipe()
        results, write = os.pipe()
        done, end = os.pipe()
        children = []
        for _ in range(6):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(start), os.close(end)
                os.read(go, 1)
                lock = DirectoryLock(tmp_path)
                try:
                    lock.acquire()
                    os.write(write, b"+")
                except ConfigError:
                    os.write(write, b"-")
                os.read(done, 1)
                os._exit(0 if lock.held else 7)
        os.close(go), os.close(start)
        outcome = b"".join(os.read(results, 1) for _ in children)
        os.close(done), os.close(end)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(outcome) == sorted(b"+-----"), number
        assert sorted(codes) == [0, 7, 7, 7, 7, 7]
        os.close(results), os.close(write)
        for path in tmp_path.iterdir():
            path.unlink()


def interrupted_at(moment, lock, history, monkeypatch):
    """Let ``lock`` be acquired, and others live through ``history`` before its ``moment``-th call; the others."""
    others, calls = [], itertools.count()

    def live():
        for action in history.split(", "):
            if action == "release":
                others[-1].release()
                continue
            others.append(DirectoryLock(lock.directory))
            try:
                others[-1].acquire()
            except ConfigError:  # the other was there first
                return

    def interrupted(real):
        def call(*args):
            if next(calls) == moment:
                live()
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("listdir", "link"):
            patch.setattr(os, name, interrupted(getattr(os, name)))
        try:
            lock.acquire()
        except ConfigError as error:
            assert others[-1].held and "in use by pid" in str(error)
    return others


@pytest.mark.parametrize("history", ["hold", "hold, release", "hold, release, hold", "hold, release, hold, release"])
@pytest.mark.parametrize("stale", ["dead", "released", "none"])
def test_others_come_and_go_between_any_two_calls(tmp_path, monkeypatch, history, stale):
    """Whenever others have a whole history while one takes the lock, exactly one owns it in the end."""
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.001)
    for moment in itertools.count():
        lock = DirectoryLock(tmp_path / str(moment))
        lock.directory.mkdir()
        if stale != "none":
            path = plant(lock.directory, 3, process_started="17")
            if stale == "released":
                os.truncate(path, 0)
        others = interrupted_at(moment, lock, history, monkeypatch)
        (owner,) = (one for one in [lock, *others] if one.held)
        owner.release()
        if not others:
            assert moment > 2
            return


def test_what_is_no_lock_is_named(tmp_path):
    (tmp_path / ".lock.2").write_text('{"pid": 3}')
    with pytest.raises(ConfigError, match=r"\.lock\.2: not a lock of megatron_ds; delete it if no job uses"):
        DirectoryLock(tmp_path).acquire()
    assert names(tmp_path) == [".lock.2"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be locked \(File exists\); name a directory"):
        DirectoryLock(tmp_path / "file").acquire()


def test_drafts_of_the_dead_go_and_those_of_the_waiting_stay(tmp_path):
    for name, age in (("old", 100), ("new", 3)):
        path = tmp_path / f".lock.draft-{name}"
        path.write_text("")
        os.utime(path, (time.time() - age,) * 2)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert names(tmp_path) == [".lock.1", ".lock.draft-new"]
    lock.release()


def test_a_locked_directory_saves_and_finds_as_any_other(tmp_path):
    lock, store = DirectoryLock(tmp_path), CheckpointStore(tmp_path, SingleProcess())
    lock.acquire()
    assert store.newest() is None
    for step in (1, 2):
        store.save(step, fragments_of(torch.arange(5.0)), rank_state={}, trainer={}, config={})
    assert lock.held
    assert open_checkpoint(tmp_path).step == 2 and not open_checkpoint(tmp_path).rejected
    lock.release()


def test_random_jobs_never_share(tmp_path):
    """Six processes take, hold and leave at random for a while, some by SIGKILL; every owner finds itself alone."""
    owned, children = tmp_path / "owned", []
    for seed in range(6):
        children.append(os.fork())
        if children[-1] == 0:
            chance, wins, until = random.Random(seed), 0, time.monotonic() + 1.5
            while time.monotonic() < until:
                lock = DirectoryLock(tmp_path / "shared")
                try:
                    lock.acquire()
                except ConfigError:
                    time.sleep(0.003 * chance.random())
                    continue
                owned.mkdir()  # fails where another owner is
                time.sleep(0.003 * chance.random())
                owned.rmdir()
                wins += 1
                lock.release() if chance.random() < 0.9 or wins < 3 else os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0 if wins else 3)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, -signal.SIGKILL} and not owned.exists(), codes
