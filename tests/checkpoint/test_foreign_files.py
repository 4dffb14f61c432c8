"""Checkpoints made to do harm: pickles are never run, and nothing outside the directory is ever opened.

The kernel tells which files were opened (inotify), whichever language opened them; Python's audit events tell whether
anything was unpickled.
"""

import ctypes
import json
import os
import pickle
import shutil
import struct
import sys
from contextlib import contextmanager

import pytest
import torch
from checkpoint_tools import fragments_of, in_child

from megatron_ds.checkpoint.manifest import MANIFEST, Manifest, list_names, seal, write_sealed
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import CheckpointError

IN_OPEN, IN_NONBLOCK = 0x20, 0o4000
SHARD = "shard_00000_000.safetensors"


@contextmanager
def opened_in(directory):
    """A list that holds, after the block, the names of all files of ``directory`` that any process opened in it."""
    libc, names = ctypes.CDLL(None, use_errno=True), []
    watch = libc.inotify_init1(IN_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(directory), IN_OPEN) >= 0
    try:
        yield names
        events = os.read(watch, 1 << 16)
    except BlockingIOError:
        events = b""
    finally:
        os.close(watch)
    while events:
        length = struct.unpack("iIII", events[:16])[3]
        names.append(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
        events = events[16 + length :]


@pytest.fixture
def saved(tmp_path):
    """A save directory with one step, and a directory outside with the same files."""
    store = CheckpointStore(tmp_path / "saved", SingleProcess())
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    report = store.save(
        7,
        fragments_of(torch.arange(6.0)),
        rank_state={"torch": torch.arange(3)},
        trainer={"step": 7},
        config={},
        extra_files={"tokenizer": tokenizer},
    )
    shutil.copytree(report.path, tmp_path / "outside")
    return report.path


def reseal(step, **content):
    """A manifest that fits the files as they are now: whoever can change files can also write one."""
    files = {name: seal(step / name).model_dump() for name in list_names(step) if name != MANIFEST}
    manifest = Manifest(step=7, world_size=1, files=files | content)
    write_sealed(step / MANIFEST, manifest.encode())


def use(step):
    """Everything that reads a checkpoint; the last error, if there is one."""
    error = None
    for path in (step, step.parent):
        for verify in (True, False):
            try:
                checkpoint = open_checkpoint(path, verify)
                checkpoint.config, checkpoint.trainer  # noqa: B018
                checkpoint.rank_state(0)
                for name in checkpoint.shapes():
                    checkpoint.read(name)
            except CheckpointError as refused:
                error = str(refused)
    return error


class Gadget:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def planted(step, name, touched, as_archive):
    """Put a pickle that would touch a file into the checkpoint."""
    (step / name).unlink(missing_ok=True)
    if as_archive:
        torch.save({"w": Gadget(touched)}, step / name)
    else:
        (step / name).write_bytes(pickle.dumps({"w": Gadget(touched)}))


def without_unpickling(work):
    """``work`` in a child in which any unpickling, and any new process, is an error."""

    def refuse(event, arguments):
        assert event not in ("pickle.find_class", "os.system", "subprocess.Popen"), (event, arguments)

    def child():
        sys.addaudithook(refuse)
        work()

    assert in_child(child) == 0


def test_the_instruments_notice(tmp_path, saved):
    with opened_in(saved) as names:
        open_checkpoint(saved).read("w")
    assert set(names) >= {SHARD, MANIFEST, "trainer.json"}
    with opened_in(tmp_path / "outside") as names:
        assert use(saved) is None
    assert names == []
    planted(saved, "x.pt", tmp_path / "touched", as_archive=False)
    assert in_child(lambda: without_unpickling(lambda: pickle.loads((saved / "x.pt").read_bytes()))) == 1
    assert not (tmp_path / "touched").exists()
    pickle.loads((saved / "x.pt").read_bytes())
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize("name", ["weights.pt", "tokenizer/x.bin", SHARD, "rank_00000.safetensors", "trainer.json"])
def test_a_planted_pickle_is_named_and_never_run(tmp_path, saved, name, as_archive):
    def work():
        planted(saved, name, tmp_path / "touched", as_archive)
        assert f"{name}: " in use(saved)

    without_unpickling(work)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize("name", [SHARD, "rank_00000.safetensors", "trainer.json", "config.json"])
def test_a_pickle_with_a_manifest_that_fits_is_not_run_either(tmp_path, saved, name, as_archive):
    def work():
        planted(saved, name, tmp_path / "touched", as_archive)
        reseal(saved)
        assert f"{name}: unreadable" in use(saved)

    without_unpickling(work)
    assert not (tmp_path / "touched").exists()


def test_an_extra_pickle_that_the_manifest_lists_is_bytes_to_copy(tmp_path, saved):
    def work():
        planted(saved, "weights.pt", tmp_path / "touched", as_archive=True)
        reseal(saved)
        assert use(saved) is None

    without_unpickling(work)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "linked",
    [SHARD, "trainer.json", "config.json", "rank_00000.safetensors", MANIFEST, "tokenizer", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_directory_is_not_followed(tmp_path, saved, linked, relative):
    """Although what it leads to is what the manifest wants, byte for byte."""
    outside, path = tmp_path / "outside" / linked, saved / linked
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(os.path.relpath(outside, path.parent) if relative else outside)
    with opened_in(tmp_path / "outside") as names, opened_in(tmp_path / "outside" / "tokenizer") as deeper:
        assert linked in use(saved)
    assert names == deeper == []


def test_a_step_that_is_a_link_is_refused(tmp_path, saved):
    shutil.rmtree(saved)
    saved.symlink_to(tmp_path / "outside")
    with opened_in(tmp_path / "outside") as names:
        assert "symbolic links are refused" in use(saved)
    assert names == []


def test_a_pointer_that_is_a_link_is_not_followed(tmp_path, saved):
    (tmp_path / "outside" / "latest").write_text("global_step1")
    (saved.parent / "latest").unlink()
    (saved.parent / "latest").symlink_to(tmp_path / "outside" / "latest")
    with opened_in(tmp_path / "outside") as names:
        assert open_checkpoint(saved.parent).rejected == []
    assert names == []


@pytest.mark.parametrize(
    "name", ["../../outside/trainer.json", "{outside}/trainer.json", "tokenizer/../../../outside/x"]
)
def test_a_manifest_that_names_files_outside_is_refused_unread(tmp_path, saved, name):
    name = name.format(outside=tmp_path / "outside")
    content = json.loads((saved / MANIFEST).read_text())
    content["files"][name] = seal(tmp_path / "outside" / "trainer.json").model_dump()
    (saved / MANIFEST).write_text(json.dumps(content))
    with opened_in(tmp_path / "outside") as names:
        assert f"{MANIFEST}: files" in use(saved)
    assert names == []


def test_a_pipe_in_place_of_a_file_is_never_waited_for(saved):
    for name in (MANIFEST, SHARD, "trainer.json"):
        (saved / name).rename(saved.parent / "aside")
        os.mkfifo(saved / name)
        assert f"{name}: is not a regular file" in use(saved)
        (saved / name).unlink()
        (saved.parent / "aside").rename(saved / name)
    assert use(saved) is None
