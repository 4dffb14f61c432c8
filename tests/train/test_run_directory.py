"""The run directory: the lock of a live job, small files, secrets."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.train.run_directory import RunDirectory, without_secrets

HOLD = (
    "import sys, time; from megatron_ds.train.run_directory import RunDirectory\n"
    "run = RunDirectory(sys.argv[1]); run.acquire(); run.write_status('training', step=7)\n"
    "print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def owner(tmp_path):
    """Another process that owns the run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def status(run):
    return json.loads(run.status.read_text())


def test_building_it_touches_nothing(tmp_path):
    RunDirectory(tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


def test_acquire_creates_it_and_says_starting(tmp_path):
    run = RunDirectory(tmp_path / "a" / "run")
    run.acquire()
    assert status(run)["state"] == "starting"
    run.write_status("failed", "it broke", 12)
    found = status(run)
    assert (found["state"], found["reason"], found["step"]) == ("failed", "it broke", 12)
    assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
    run.release()


def test_a_second_live_job_is_refused_and_told_by_whom(tmp_path, owner):
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path / "run").acquire()
    assert f"/run is in use by pid {owner.pid} on host {socket.gethostname()} (last sign of life " in str(caught.value)
    assert str(caught.value).endswith(" s ago); stop that job or give this one another --run-name")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["pid"] == owner.pid


def test_a_dead_owner_is_taken_over(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    assert status(run)["pid"] == os.getpid() and run.held
    run.release()
    assert not run.held


def test_a_directory_that_cannot_be_created_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created: .*; set --run-dir"):
        RunDirectory(tmp_path / "file" / "run").acquire()


def test_the_run_id_is_made_once_and_follows_a_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    first = run.run_id()
    assert len(first) == 8
    assert RunDirectory(tmp_path).run_id() == first
    assert RunDirectory(tmp_path).run_id("from-ckpt") == "from-ckpt"
    assert RunDirectory(tmp_path).run_id() == "from-ckpt"


def test_secrets_are_not_written(tmp_path):
    tree = {
        "comet": {"enabled": True, "api_key": "PLANTED", "project": "p"},
        "megatron_ds": {
            "model": {"seq_length": 8},
            "data": {"tokenizer": "t", "eod_mask_loss": True, "hf-token": "PLANTED"},
        },
        "password": "PLANTED",
        "train_tokens": 3,
    }
    clean = {
        "comet": {"enabled": True, "project": "p"},
        "megatron_ds": {"model": {"seq_length": 8}, "data": {"tokenizer": "t", "eod_mask_loss": True}},
        "train_tokens": 3,
    }
    assert without_secrets(tree) == clean
    run = RunDirectory(tmp_path)
    run.write_config(tree)
    assert json.loads(run.config.read_text()) == clean
