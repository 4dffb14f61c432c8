"""The ledger: exact round trips, torn lines, resuming, and the comparison of replayed steps."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.errors import DataError
from megatron_ds.train.ledger import Ledger, Past, read


def step_row(step, loss=None, grad_norm=1.0):
    return {
        "kind": "step",
        "step": step,
        "train/loss": 1 / (step + 1) if loss is None else loss,
        "optim/grad_norm": grad_norm,
    }


def written(path, steps):
    """A ledger of a first life with the given steps."""
    ledger = Ledger(path)
    ledger.resume(0)
    for step in steps:
        ledger.append(step_row(step))
    return ledger


def steps_of(path):
    return [row["step"] for row in read(path) if row["kind"] == "step"]


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_floats_round_trip_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    for step, value in enumerate(values):
        ledger.append({"kind": "eval", "step": step, "eval/loss": value})
    assert [repr(row["eval/loss"]) for row in read(path)] == [repr(value) for value in values]
    ledger.close()


def test_lines_are_strict_json_and_readable_while_the_file_is_open(tmp_path):
    ledger = Ledger(tmp_path / "l")
    ledger.append({"kind": "step", "step": 1, "train/loss": math.nan, "optim/grad_norm": math.inf, "a": -math.inf})
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    assert json.loads((tmp_path / "l").read_text(), **refuse)["train/loss"] == "NaN"
    row = read(tmp_path / "l")[0]
    assert math.isnan(row["train/loss"])
    assert (row["optim/grad_norm"], row["a"]) == (math.inf, -math.inf)
    ledger.close()


def test_lists_inside_a_row_round_trip_and_survive_a_resume(tmp_path):
    record = {"load": [[1, 2], [3, 4]], "bias": [[math.inf, -math.inf], [0.1, 2.5]], "none": None}
    ledger = Ledger(tmp_path / "l")
    ledger.append(step_row(1) | {"experts": record})
    ledger.append(step_row(2) | {"experts": record})
    ledger.close()
    ledger = Ledger(tmp_path / "l")
    assert ledger.resume(1).last_step["experts"] == record
    assert ledger.append(step_row(2) | {"experts": {}}).ok
    ledger.close()
    assert [row["experts"] for row in read(tmp_path / "l") if row["kind"] == "step"] == [record, {}]


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "step", "step": 4, "train/loss": 0.12', b"\x00" * 9000])
def test_an_unfinished_last_line_is_ignored_and_then_cut_off(tmp_path, torn):
    path = tmp_path / "l"
    written(path, [1, 2, 3]).close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert steps_of(path) == [1, 2, 3]
    Ledger(path).close()
    assert path.read_bytes() == whole


def test_a_file_that_holds_only_an_unfinished_line_becomes_empty(tmp_path):
    (tmp_path / "l").write_bytes(b'{"kind"')
    Ledger(tmp_path / "l").close()
    assert (tmp_path / "l").read_bytes() == b""


@pytest.mark.parametrize("damage", [b"not json\n", b"[1]\n", b'{"step": 3}\n', b"3\n"])
def test_damage_in_the_middle_names_the_line(tmp_path, damage):
    path = tmp_path / "l"
    written(path, [1, 2]).close()
    path.write_bytes(path.read_bytes() + damage + b'{"kind": "step", "step": 3}\n')
    with pytest.raises(DataError, match=r"l:4: not a ledger row"):
        read(path)
    with pytest.raises(DataError, match=r"l:4: not a ledger row"):
        Ledger(path).resume(1)


def test_resume_keeps_the_steps_up_to_the_checkpoint_and_all_lives(tmp_path):
    path = tmp_path / "l"
    ledger = written(path, [1, 2, 3])
    ledger.append({"kind": "eval", "step": 2, "eval/loss": 1.0})
    ledger.append({"kind": "eval", "step": 3, "eval/loss": 1.0})
    ledger.append({"kind": "end", "step": 3, "state": "failed"})
    ledger.close()
    ledger = Ledger(path)
    past = ledger.resume(2)
    ledger.close()
    assert past == Past(last_step=step_row(2), restarts=1, lost_steps=1)
    kept = [(row["kind"], row["step"]) for row in read(path)]
    assert kept == [("start", 0), ("step", 1), ("step", 2), ("eval", 2), ("end", 3), ("start", 2)]


def test_lost_steps_add_up_over_restarts(tmp_path):
    path = tmp_path / "l"
    written(path, [1, 2, 3, 4, 5]).close()
    for step, want in ((3, Past(step_row(3), 1, 2)), (1, Past(step_row(1), 2, 4)), (1, Past(step_row(1), 3, 4))):
        ledger = Ledger(path)
        assert ledger.resume(step) == want
        ledger.close()
    assert steps_of(path) == [1]


def test_replayed_steps_are_compared_bit_for_bit(tmp_path):
    path = tmp_path / "l"
    ledger = written(path, [1, 2])
    ledger.append(step_row(3, loss=math.nan))
    ledger.append(step_row(4, loss=0.1 + 0.2))
    ledger.append(step_row(5, grad_norm=2.0))
    ledger.close()
    ledger = Ledger(path)
    ledger.resume(1)
    replays = [
        ledger.append(step_row(2)),
        ledger.append(step_row(3, loss=math.nan)),
        ledger.append(step_row(4, loss=0.3)),
        ledger.append(step_row(5, grad_norm=math.nextafter(2.0, 3.0))),
        ledger.append(step_row(6)),
    ]
    ledger.close()
    assert [replay and replay.ok for replay in replays] == [True, True, False, False, None]
    assert replays[2].difference == "train/loss was 0.30000000000000004 and is now 0.3"
    assert replays[3].difference == "optim/grad_norm was 2.0 and is now 2.0000000000000004"
    assert [replay and replay.last for replay in replays] == [False, False, False, True, None]
    said = [row.get("health/replay_ok") for row in read(path) if row["kind"] == "step"]
    assert said == [None, True, True, False, False, None]


def test_an_evaluation_is_not_taken_for_a_replayed_step(tmp_path):
    path = tmp_path / "l"
    written(path, [1, 2]).close()
    ledger = Ledger(path)
    ledger.resume(1)
    assert ledger.append({"kind": "eval", "step": 2, "eval/loss": 9.0}) is None
    assert ledger.append(step_row(2)).ok
    ledger.close()


def test_every_appended_row_survives_kill_9(tmp_path):
    path = tmp_path / "l"
    code = (
        "import os, signal, sys; from pathlib import Path; from megatron_ds.train.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.resume(0)\n"
        "for step in range(1, 51): ledger.append({'kind': 'step', 'step': step, 'train/loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["train/loss"] for row in read(path) if row["kind"] == "step"] == [1 / step for step in range(1, 51)]
