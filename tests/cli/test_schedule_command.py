"""``megatron-ds schedule``: order, figures, picture and trace from flags or a configuration; errors of one line."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_ds.cli.main import main
from megatron_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
INTERLEAVED = ["--name", "interleaved", "--pp", "4", "--microbatches", "8", "--vpp", "2"]


@pytest.fixture
def shown(capsys, monkeypatch):
    """Runs the command at a width; returns its lines."""

    def run(*flags, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["schedule", *map(str, flags)]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def cells(lines):
    return [" ".join(line.split()) for line in lines]


def test_order_and_figures(shown):
    lines = shown(*INTERLEAVED)
    assert lines[:2] == [
        "interleaved, 4 ranks, 8 micro-batches, 2 chunks per rank",
        "F forward, B backward; 1F0: chunk 1, micro-batch 0",
    ]
    assert lines[3] == "rank 0  0F0 0F1 0F2 0F3 1F0 1F1 1F2 1F3 0F4 0F5 0F6 1B0 0F7 1B1 1F4 1B2 1F5 1B3"
    assert lines[8] == "rank 0  1F6 0B0 1F7 0B1 0B2 0B3 1B4 1B5 1B6 1B7 0B4 0B5 0B6 0B7"
    assert {"0 15.8 % 5.5", "1 15.8 % 4.5", "2 15.8 % 3.5", "3 15.8 % 2.5"} <= set(cells(lines))
    assert lines[-4:] == [
        "makespan: 28.5 (1f1b: 33)",
        "bubble: 15.8 % (1f1b: 27.3 %)",
        "peak activations: 5.5 (1f1b: 4), in those of one micro-batch in all layers of a rank",
        "times of a rank's layers: forward 1, backward 1 + 1, latency 0",
    ]


@pytest.mark.parametrize("columns", [80, 160])
def test_the_order_fits_the_terminal_and_is_complete(shown, columns):
    lines = shown("--name", "zb_v", "--pp", 4, "--microbatches", 8, columns=columns)
    assert max(map(len, lines[:-2])) <= columns
    for rank in range(4):
        passes = [cell for line in lines if line.startswith(f"rank {rank} ") for cell in line.split()[2:]]
        assert len(passes) == len(set(passes)) == 8 * 2 * 3


def test_durations_and_latency_count(shown):
    flags = ["--forward", 2, "--backward-input", 3, "--backward-weight", 4, "--latency", 0.5]
    lines = shown("--name", "1f1b", "--pp", 2, "--microbatches", 2, *flags)
    assert lines[-4] == "makespan: 28 (1f1b: 28)"  # (2 + 2 - 1) * 9, and a message there and back
    assert lines[-1] == "times of a rank's layers: forward 2, backward 3 + 4, latency 0.5"


def test_one_rank_has_no_bubble(shown):
    assert shown("--name", "1f1b", "--pp", 1, "--microbatches", 1)[-3] == "bubble: 0.0 % (1f1b: 0.0 %)"


def test_chunks_are_as_few_as_the_schedule_can_have(shown):
    assert shown(*INTERLEAVED[:-2])[0] == "interleaved, 4 ranks, 8 micro-batches, 2 chunks per rank"
    assert shown("--name", "zb_h1", "--pp", 4, "--microbatches", 8)[0] == "zb_h1, 4 ranks, 8 micro-batches"


def test_picture_and_trace_hold_every_pass(shown, tmp_path):
    shown(*INTERLEAVED, "--svg", tmp_path / "a.svg", "--trace", tmp_path / "a.json")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root[0].text == "interleaved, 4 ranks, 8 micro-batches, 2 chunks per rank: bubble 15.8 %"
    assert sum(len(rect) for rect in root.iter("{http://www.w3.org/2000/svg}rect")) == 4 * 8 * 2 * 2
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    passes = [event for event in events if event["ph"] == "X"]
    assert len(passes) == 4 * 8 * 2 * 2
    assert max(event["ts"] + event["dur"] for event in passes) == pytest.approx(28_500)


def test_sizes_of_a_configuration(shown, tmp_path):
    file = ROOT / "ds_configs" / "v1_tiny.json"
    assert shown("--deepspeed_config", file, "--world-size", 2)[0] == "1f1b, 2 ranks, 8 micro-batches"
    tree = json.loads(file.read_text())
    tree["megatron_ds"]["parallel"] |= {"schedule": {"kind": "zb_v"}, "pipeline_model_parallel_size": 2}
    tree["megatron_ds"]["model"]["num_layers"] = 8
    (tmp_path / "v.json").write_text(json.dumps(tree))
    lines = shown("--deepspeed_config", tmp_path / "v.json", "--world-size", 2)
    assert lines[0] == "zb_v, 2 ranks, 8 micro-batches, 2 chunks per rank"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--name zbv --pp 4 --microbatches 8", r"--name zbv: no such schedule; did you mean zb_v\?"),
        ("--name xyz --pp 4 --microbatches 8", r"--name xyz: no such schedule; choose 1f1b, interleaved, zb_h1, zb_v"),
        ("--name interleaved --pp 4 --microbatches 9", r"interleaved: .*multiple of the 4 ranks.*; use 8.*"),
        ("--name 1f1b --pp 4 --microbatches 8 --vpp 2", r"1f1b: .* needs 1.*"),
        ("--name zb_v --pp 4 --microbatches 8 --vpp 3", r"zb_v: .* needs 2.*"),
        ("--name interleaved --pp 4 --microbatches 8 --vpp 1", r"interleaved: .* needs 2 or more.*"),
        ("--name 1f1b --pp 4", r"--microbatches is missing; give it, or --deepspeed_config FILE and --world-size N"),
        ("--name 1f1b --pp 0 --microbatches 8", r"argument --pp: must be a whole number from 1 on, not 0; see .*"),
        ("--name 1f1b --pp 2 --microbatches 2.5", r"argument --microbatches: must be a whole number .*"),
        ("--name 1f1b --pp 2 --microbatches 2 --forward 0", r"argument --forward: must be more than 0; see .*"),
        ("--name 1f1b --pp 2 --microbatches 2 --latency nan", r"argument --latency: must be a time of 0 or more.*"),
        (
            "--name 1f1b --pp 2 --microbatches 2 --latency x",
            r"argument --latency: must be a time of 0 or more, not x.*",
        ),
        ("--name 1f1b --pp 2 --microbatches 2 --world-size 2", r"--world-size belongs to --deepspeed_config; .*"),
        ("--deepspeed_config a.json", r"--deepspeed_config needs --world-size: .*"),
        ("--deepspeed_config a.json --world-size 2 --pp 2", r"--pp is what --deepspeed_config says; .*"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=rf"^{message}$") as caught:
        main(["schedule", *flags.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--svg", "--trace"])
def test_a_file_that_cannot_be_written_is_one_line_and_code_2(flag, tmp_path):
    command = [sys.executable, "-m", "megatron_ds.cli.main", "schedule", *INTERLEAVED, flag, "no/such/file"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {flag} no/such/file: cannot be written (No such file or directory); "
        "name a file in a folder that exists\n"
    )
