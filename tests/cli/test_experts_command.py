"""``megatron-ds experts``: the table of one step, made from a ledger alone."""

import json
import os
import subprocess
import sys

import pytest

from megatron_ds.cli.main import main
from megatron_ds.errors import ConfigError, DataError

SMALL = {
    "layers": [1, 3],
    "ranks": 2,
    "load": [[10, 20, 30, 20], [0, 0, 0, 80]],
    "dropped": [[0, 0, 4, 0], [0, 0, 0, 0]],
    "bias": [[0.0, 0.001, -0.002, 0.0], [0.5, 0.0, 0.0, -0.25]],
    "bytes_sent": [1500000.0, 2000000.0],
    "exchange_s": [0.0101, 0.02],
    "exposed_s": [0.001, 0.002],
    "aux_loss": [0.01, 0.02],
}
LARGE = {
    "layers": [0],
    "ranks": 1,
    "load": [[0, 1, *[100] * 17, 350]],
    "dropped": [[0] * 20],
    "bias": None,
    "bytes_sent": [0.0],
    "exchange_s": [0.0],
    "exposed_s": [0.0],
    "aux_loss": [0.0],
}


@pytest.fixture
def run(tmp_path):
    """Writes rows as the ledger of a run; returns the run directory."""

    def write(*rows):
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


def step(number, record=None):
    return {"kind": "step", "step": number} | ({"experts": record} if record else {})


def shown(capsys, directory, *flags):
    assert main(["experts", "--run", str(directory), *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_line_per_layer(run, capsys):
    lines = shown(capsys, run(step(1, LARGE), step(2, SMALL), step(3)))
    assert lines[0].endswith(", step 2: 4 experts on 2 ranks, load / mean load of the layer (balance is 1.00)")
    cells = [" ".join(line.split()) for line in lines[3:]]
    assert cells[0] == "layer 0 1 2 3 mean entropy dead % min max max/mean sent ms ms"
    assert cells[2] == "1 0.50 1.00 1.50 1.00 1.50 0.953 0 5.00 -0.002 +0.001 1.21 1.50 10.1 1.0"
    assert cells[3] == "3 0.00 0.00 0.00 4.00 4.00 0.000 3 0.00 -0.250 +0.500 2.00 2.00 20.0 2.0"
    assert lines[-2:] == ["assignments: 160 = layers 2 x 80 (tokens x topk)", "dropped: 4 (2.50 %)"]
    assert max(map(len, lines[1:])) <= 120


def test_many_experts_are_bars_and_only_a_dead_one_is_empty(run, capsys):
    lines = shown(capsys, run(step(5, LARGE)))
    assert lines[0].endswith(", step 5: 20 experts, a bar for each, full at 2 times the mean load of the layer")
    (row,) = (line for line in lines if "█" in line)
    assert row.split()[:3] == ["0", f"▁{'▄' * 17}█", "3.41"]
    assert row[row.index("▁") - 1] == " "


def test_a_step_can_be_chosen(run, capsys):
    directory = run(step(5, SMALL), step(10, LARGE))
    assert ", step 5: 4 experts" in shown(capsys, directory, "--step", "5")[0]
    with pytest.raises(
        ConfigError, match=r"^--step 7: the ledger has no experts of this step; the nearest is --step 5$"
    ):
        main(["experts", "--run", str(directory), "--step", "7"])


def test_a_dense_run_is_one_line(run):
    with pytest.raises(ConfigError, match=r"--run .*: its ledger knows no experts; give a run with --num-experts"):
        main(["experts", "--run", str(run(step(1)))])


def test_a_missing_ledger_is_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "megatron_ds.cli.main", "experts", "--run", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: nothing/ledger.jsonl: cannot be read (No such file or directory); "
        "give a run directory such as runs/NAME\n"
    )


def test_a_damaged_ledger_names_the_line(run):
    directory = run(step(1, SMALL), ["no row"], step(2, SMALL))
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: not a ledger row"):
        main(["experts", "--run", str(directory)])
