"""The monitor in a process of its own, as in a run: ledger, status, console, events, and W&B's real offline records.

Executed as a script, this file is that process: ``python test_monitor.py RUN_DIR FIRST LAST [drill]``.
"""

import json
import math
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import psutil
import pytest
from expert_loads import expert_load
from PIL import Image

from megatron_ds.config.deepspeed_keys import WandbKeys
from megatron_ds.config.schema import MonitorConfig
from megatron_ds.train.expert_load import to_record
from megatron_ds.train.ledger import read
from megatron_ds.train.metrics import METRICS, EvalResult, RunFacts, StepRow
from megatron_ds.train.monitor import SMALL_RECORD, CheckpointReport, Monitor
from megatron_ds.train.run_directory import RunDirectory

FACTS = RunFacts(
    name="tiny",
    train_iters=40,
    seq_length=32,
    devices=2,
    gradient_clipping=1.0,
    peak_flops=1e12,
    roof_flops=1e11,
)
NUM_EXPERTS = 4
NAN_STEP = 7
SKIPPED_STEP = 8


def loss_of(step):
    return math.nan if step == NAN_STEP else 8 / (1 + step / 10)


def load_of(step, num_experts=NUM_EXPERTS):
    """Two layers; expert 3 of the second one receives nothing from step 4 to 8."""
    dead = 4 <= step <= 8
    even = [64] * num_experts
    return expert_load([even, [*even[:-1], 0 if dead else 64]], bias=[[0.5] * num_experts, [0.25] * num_experts])


def row_of(step):
    """The facts of a step, the same in every life of the run."""
    return StepRow(
        step=step,
        consumed_samples=4 * step,
        consumed_tokens=128 * step,
        batch_size=4,
        loss=loss_of(step),
        mtp_loss=loss_of(step),
        counted_tokens=120,
        lr=1e-3 / step,
        grad_norm=1.5 if step % 2 else 0.5,
        loss_scale=1.0,
        skipped=step == SKIPPED_STEP,
        step_seconds=0.5,
        data_seconds=0.01,
        flops_per_token=1e8,
        host_rss_bytes=1 << 30,
        device_peak_bytes=1 << 29,
        expert_load=load_of(step),
    )


def monitored(run_dir, first, last, drill="", rank=0):
    """Steps first..last of a run that evaluates at 10 and saves at 12."""
    run, events = RunDirectory(run_dir), []
    if rank == 0:
        run.acquire()
    config = {"megatron_ds": {"model": {"num_layers": 2}}, "comet": {"api_key": "PLANTED-SECRET"}}
    monitor = Monitor(
        MonitorConfig(log_interval=5, dead_expert_steps=3),
        WandbKeys(enabled=True, project="p", group="g"),
        run,
        FACTS,
        rank=rank,
        config=config,
        step=first - 1,
        samples=4 * (first - 1),
        tokens=128 * (first - 1),
        event_writer=events.extend,
    )
    monitor.message("header")
    for step in range(first, last + 1):
        monitor.step(row_of(step))
        if step == 10:
            with monitor.phase("evaluating"):
                results = {"code": EvalResult(2.0, 100, 300), "prose": EvalResult(3.0, 100, 300)}
            monitor.evaluation(step, results)
        if step == 12:
            monitor.checkpoint(CheckpointReport(step, run.checkpoints / "global_step12", 1.5, 0.25, 1000))
            if drill == "kill wandb":
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                    child.wait()
        if drill == "kill -9" and step == last:
            os._exit(9)
    monitor.close("finished", "all done")
    return events


def launch(run_dir, first, last, drill="", **env):
    """Run this file; W&B finds no login but what ``env`` gives. Returns what it printed."""
    home = Path(run_dir).parent / "home"
    home.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, __file__, str(run_dir), str(first), str(last), drill],
        # matplotlib keeps its list of fonts, as in a run, and W&B is alone in the empty home.
        env=kept
        | {"HOME": str(home), "WANDB_ERROR_REPORTING": "false", "MPLCONFIGDIR": matplotlib.get_cachedir()}
        | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == (9 if drill == "kill -9" else 0), done.stderr
    return done.stdout


def inspect(offline_dir, *options):
    """W&B's own reader."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", *options, str(offline_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def offline_dirs(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def first_life(tmp_path_factory):
    """Thirteen steps of a run; what it printed and its directory."""
    run_dir = tmp_path_factory.mktemp("monitor") / "tiny"
    return launch(run_dir, 1, 13), run_dir


@pytest.fixture(scope="module")
def records(first_life):
    """W&B's records of the first life."""
    _, run_dir = first_life
    (offline_dir,) = offline_dirs(run_dir)
    return [json.loads(line) for line in inspect(offline_dir).splitlines()]


# --- ledger, status, console, events --------------------------------------------------------------------------------


def test_the_ledger_has_every_step_exactly(first_life):
    _, run_dir = first_life
    rows = [row for row in read(run_dir / "ledger.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert [repr(row["train/loss"]) for row in rows] == [repr(loss_of(step)) for step in range(1, 14)]
    assert [row["health/nan_steps"] for row in rows] == [0] * 6 + [1] * 7
    assert [row["optim/skipped_steps"] for row in rows] == [0] * 7 + [1] * 6
    assert rows[-1]["progress/eta_s"] >= 0


def test_the_ledger_has_evaluations_checkpoints_and_lives(first_life):
    _, run_dir = first_life
    rows = [row for row in read(run_dir / "ledger.jsonl") if row["kind"] != "step"]
    assert [(row["kind"], row["step"]) for row in rows] == [("start", 0), ("eval", 10), ("checkpoint", 12), ("end", 13)]
    assert (rows[1]["eval/loss"], rows[1]["eval/code/loss"], rows[1]["progress/tokens"]) == (2.5, 2.0, 1280)
    assert (rows[2]["ckpt/save_s"], rows[2]["ckpt/bytes"]) == (1.5, 1000)
    assert (rows[3]["state"], rows[3]["reason"]) == ("finished", "all done")


def test_the_status_says_how_it_ended(first_life):
    _, run_dir = first_life
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("finished", "all done", 13)


def test_the_console_has_a_line_an_interval_and_one_for_the_rest(first_life):
    printed, run_dir = first_life
    lines = [line for line in printed.splitlines() if "iteration " in line and "lm loss:" in line]
    assert [line.split("|")[0].split("iteration")[1].split("/")[0].strip() for line in lines] == ["5", "10", "13"]
    assert "| number of skipped iterations:   1 | number of nan iterations:   1 |" in lines[1]
    assert printed.count("validation-code loss at iteration 10 |") == 1
    assert f"  successfully saved checkpoint at iteration      12 to {run_dir}/checkpoints/global_step12\n" in printed
    assert "header\n" in printed


def test_events_carry_the_same_metrics_with_the_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    events = monitored(tmp_path / "tiny", 1, 13)
    losses = {step: value for name, value, step in events if name == "train/loss"}
    assert losses[5] == pytest.approx(sum(loss_of(step) for step in range(1, 6)) / 5)
    assert losses[13] == pytest.approx(sum(loss_of(step) for step in range(11, 14)) / 3)
    assert ("eval/loss", 2.5, 10) in events
    assert ("ckpt/bytes", 1000.0, 12) in events
    assert {type(value) for _, value, _ in events} == {float}


def test_the_other_ranks_write_nothing(tmp_path, capsys):
    assert monitored(tmp_path / "tiny", 1, 13, rank=1) == []
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_status_follows_the_phases(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = RunDirectory(tmp_path / "tiny")
    run.acquire()
    monitor = Monitor(MonitorConfig(), WandbKeys(), run, FACTS, rank=0, config={})
    seen = []

    def look():
        status = json.loads(run.status.read_text())
        seen.append((status["state"], status["step"]))

    look()
    monitor.step(row_of(1))
    look()
    with monitor.phase("saving"):
        look()
    look()
    monitor.close("failed", "why")
    look()
    run.release()
    assert seen == [("starting", None), ("training", 0), ("saving", 1), ("training", 1), ("failed", 1)]


# --- experts --------------------------------------------------------------------------------------------------------


def test_the_ledger_keeps_every_expert_of_every_step(first_life):
    _, run_dir = first_life
    rows = [row for row in read(run_dir / "ledger.jsonl") if row["kind"] == "step"]
    assert [row["experts"] for row in rows] == [to_record(load_of(step)) for step in range(1, 14)]
    assert [sum(map(sum, row["experts"]["load"])) for row in rows] == [row["moe/assignments"] for row in rows]
    assert [row["moe/dead_experts"] for row in rows] == [0] * 3 + [1] * 5 + [0] * 5
    (evaluation,) = (row for row in read(run_dir / "ledger.jsonl") if row["kind"] == "eval")
    assert evaluation["experts"] == to_record(load_of(10))


def test_the_console_warns_of_a_dead_expert_and_of_its_end(first_life):
    printed, _ = first_life
    assert [line for line in printed.splitlines() if "received" in line] == [
        "step 6: layer 1: expert 3 received nothing for 3 steps; raise --moe-router-bias-update-rate",
        "step 9: layer 1: expert 3 received tokens again",
    ]


def test_the_picture_of_the_last_evaluation_is_in_the_run_directory_and_in_wandb(first_life, records):
    _, run_dir = first_life
    with Image.open(run_dir / "experts.png") as image:
        image.verify()
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    (row,) = (row for row in rows if "moe/load.path" in row)
    assert (row["progress/tokens"], row["moe/load._type"]) == (1280, "image-file")
    (copy,) = (run_dir / "wandb").glob("offline-run-*/files/media/images/moe/*.png")
    assert copy.read_bytes() == (run_dir / "experts.png").read_bytes()


def test_a_large_record_is_kept_at_log_intervals_and_evaluations_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run, events = RunDirectory(tmp_path / "tiny"), []
    run.acquire()
    monitor = Monitor(
        MonitorConfig(log_interval=5), WandbKeys(), run, FACTS, rank=0, config={}, event_writer=events.extend
    )
    for step in range(1, 8):
        monitor.step(replace(row_of(step), expert_load=load_of(step, num_experts=SMALL_RECORD // 2 + 1)))
    monitor.evaluation(7, {"validation": EvalResult(2.0, 100)})
    monitor.close("finished")
    run.release()
    rows = read(run.ledger)
    assert [(row["kind"], row["step"]) for row in rows if "experts" in row] == [("step", 5), ("eval", 7)]
    assert all("moe/max_over_mean" in row for row in rows if row["kind"] == "step")
    assert "experts" not in {name for name, _, _ in events}


def test_a_dense_run_has_no_trace_of_experts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = RunDirectory(tmp_path / "tiny")
    run.acquire()
    monitor = Monitor(MonitorConfig(), WandbKeys(), run, FACTS, rank=0, config={})
    monitor.step(replace(row_of(1), expert_load=None))
    monitor.evaluation(1, {"validation": EvalResult(2.0, 100)})
    monitor.close("finished")
    run.release()
    assert "moe/" not in run.ledger.read_text()
    assert "experts" not in run.ledger.read_text()
    assert not run.experts.exists()


# --- W&B ------------------------------------------------------------------------------------------------------------


def test_wandb_holds_every_documented_metric(first_life, records):
    logged = {name for record in records if record["type"] == "history" for name in record["history"]["item"]}
    replayed_only = {"health/replay_ok"}
    assert set(METRICS) - replayed_only <= logged
    assert {"eval/code/loss", "eval/prose/ppl"} <= logged


def test_wandb_binds_every_metric_to_tokens(records):
    bound = {
        metric.get("name", metric.get("glob_name")): metric.get("step_metric")
        for metric in (record["metric"] for record in records if record["type"] == "metric")
    }
    assert bound.pop("progress/tokens") is None
    assert bound["*"] == "progress/tokens"
    assert set(bound.values()) == {"progress/tokens"}


def test_wandb_rows_have_rising_tokens_and_interval_means(records):
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["progress/tokens"] for row in steps] == [640, 1280, 1664]
    assert [row["progress/step"] for row in steps] == [5, 10, 13]
    assert steps[0]["train/loss"] == pytest.approx(sum(loss_of(step) for step in range(1, 6)) / 5)
    evaluation = next(row for row in rows if "eval/loss" in row)
    assert (evaluation["progress/tokens"], evaluation["eval/loss"]) == (1280, 2.5)


def test_wandb_summary_config_and_identity(first_life):
    _, run_dir = first_life
    (offline_dir,) = offline_dirs(run_dir)
    summary = json.loads(inspect(offline_dir, "--summary"))
    assert summary["state"] == "finished"
    assert summary["exit_code"] == 0
    assert summary["run_id"] == (run_dir / "run_id").read_text().strip()
    assert (summary["project"], summary["name"]) == ("p", "tiny")
    assert summary["config"] == {"megatron_ds": {"model": {"num_layers": 2}}}
    assert summary["summary"]["progress/step"] == 13
    assert summary["summary"]["eval/loss"] == {"min": 2.5}
    assert summary["summary"]["train/loss"]["min"] == pytest.approx(sum(loss_of(step) for step in range(11, 14)) / 3)


def test_wandb_stays_in_the_run_directory_and_holds_no_secret(first_life):
    printed, run_dir = first_life
    assert [path for path in (run_dir.parent / "home").rglob("*") if path.is_file()] == []
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"PLANTED" in path.read_bytes()]
    assert f"     upload: wandb sync {run_dir}/wandb/offline-run-*\n" in printed


def test_a_killed_run_continues_under_the_same_id_and_compares_its_steps(tmp_path):
    run_dir = tmp_path / "tiny"
    launch(run_dir, 1, 14, drill="kill -9")
    printed = launch(run_dir, 13, 16)
    assert "all steps up to 14 that were done again came out as before the restart\n" in printed
    rows = [row for row in read(run_dir / "ledger.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row.get("health/replay_ok") for row in rows[11:]] == [None, True, True, None, None]
    assert (rows[-1]["health/restarts"], rows[-1]["health/lost_steps"]) == (1, 2)
    assert (rows[-1]["health/nan_steps"], rows[-1]["optim/skipped_steps"]) == (1, 1)
    first, second = offline_dirs(run_dir)
    run_id = (run_dir / "run_id").read_text().strip()
    assert first.name.endswith(run_id)
    assert second.name.endswith(run_id)
    history = [json.loads(line) for line in inspect(second).splitlines()]
    items = [record["history"]["item"] for record in history if record["type"] == "history"]
    assert [item["progress/tokens"] for item in items] == [15 * 128, 16 * 128]
    assert items[0]["health/replay_ok"] is True
    assert next(record["run"] for record in history if record["type"] == "run")["resume"] is True


def test_a_step_that_comes_out_differently_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = RunDirectory(tmp_path / "tiny")
    run.acquire()
    run.ledger.write_text(
        "".join(
            json.dumps({"kind": "step", "step": step, "train/loss": 1.25, "optim/grad_norm": 1.5}) + "\n"
            for step in (1, 2)
        )
    )
    monitor = Monitor(MonitorConfig(), WandbKeys(), run, FACTS, rank=0, config={})
    monitor.step(row_of(1))
    monitor.step(row_of(2))
    monitor.close("finished")
    run.release()
    said = [line for line in capsys.readouterr().out.splitlines() if "restart" in line]
    assert said == [
        f"step 1 came out differently before the restart: train/loss was 1.25 and is now {loss_of(1)!r}",
    ]
    assert [row["health/replay_ok"] for row in read(run.ledger) if row["kind"] == "step"] == [False, False]


def test_training_goes_on_when_wandb_dies(tmp_path):
    run_dir = tmp_path / "tiny"
    printed = launch(run_dir, 1, 30, drill="kill wandb")
    assert printed.count("off from here on, the ledger has every step") == 1
    assert len([row for row in read(run_dir / "ledger.jsonl") if row["kind"] == "step"]) == 30
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_a_login_that_fails_falls_back_to_offline(tmp_path):
    run_dir = tmp_path / "tiny"
    printed = launch(run_dir, 1, 5, WANDB_API_KEY="too-short")
    assert "recording offline\n" in printed
    assert "W&B: offline; look: wandb leet" in printed
    (offline_dir,) = offline_dirs(run_dir)
    assert json.loads(inspect(offline_dir, "--summary"))["summary"]["progress/step"] == 5


def test_training_goes_on_when_wandb_cannot_read_its_environment(tmp_path):
    printed = launch(tmp_path / "tiny", 1, 5, WANDB_MODE="sometimes")
    assert printed.count("off from here on, the ledger has every step") == 1
    assert "Input should be 'online'" in printed


def test_no_prompt_in_a_terminal_even_when_online_is_asked_for(tmp_path):
    """A pseudo-terminal on all three streams, WANDB_MODE=online and no login: W&B would ask; we do not."""
    master, slave = pty.openpty()
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "tiny"), "1", "13", ""],
        env=kept | {"HOME": str(home), "WANDB_MODE": "online", "TERM": "xterm", "COLUMNS": "100"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = drained(master).decode()
    assert process.wait() == 0
    assert "W&B: offline" in shown
    assert "ETA" in shown
    assert "step 10  code loss 2.0000" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def drained(descriptor):
    """Everything written to a pseudo-terminal until its other side is closed."""
    content = b""
    try:
        while chunk := os.read(descriptor, 65536):
            content += chunk
    except OSError:  # Linux reports the closed side as an input/output error
        pass
    os.close(descriptor)
    return content


if __name__ == "__main__":
    monitored(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
