"""Names, values and rules of the metrics; the console's formats; the documentation of both."""

import io
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from megatron_ds.train.console import (
    LiveConsole,
    LiveView,
    LogConsole,
    duration,
    iteration_line,
    open_console,
    short,
    validation_line,
)
from megatron_ds.train.metrics import (
    METRICS,
    EvalResult,
    Interval,
    RunFacts,
    StepRow,
    eval_metrics,
    metric,
    step_metrics,
)

FACTS = RunFacts(name="tiny", train_iters=1000, seq_length=32, devices=2, gradient_clipping=1.0)
ROW = StepRow(
    step=10,
    consumed_samples=1280,
    consumed_tokens=40960,
    batch_size=128,
    loss=6.812345,
    counted_tokens=4000,
    lr=1.5e-4,
    grad_norm=1.234,
    loss_scale=1.0,
    skipped=False,
    step_seconds=0.512,
    data_seconds=0.128,
    flops_per_token=1e9,
    host_rss_bytes=3 << 29,
)


def replaced(row, **changes):
    return StepRow(**{**{name: getattr(row, name) for name in row.__dataclass_fields__}, **changes})


def facts(**changes):
    return RunFacts(**{**{name: getattr(FACTS, name) for name in FACTS.__dataclass_fields__}, **changes})


def interval_of(*rows, nan=0):
    interval = Interval()
    for index, row in enumerate(rows):
        interval.add(step_metrics(row, FACTS), skipped=row.skipped, nan=index < nan)
    return interval.report()


# --- metrics --------------------------------------------------------------------------------------------------------


def test_step_metrics_are_the_arithmetic_of_the_facts():
    assert step_metrics(ROW, FACTS) == {
        "progress/step": 10,
        "progress/tokens": 40960,
        "progress/samples": 1280,
        "train/loss": 6.812345,
        "train/batch_size": 128,
        "train/supervised_tokens": 4000,
        "optim/lr": 1.5e-4,
        "optim/grad_norm": 1.234,
        "optim/clip_frac": 1.0,
        "optim/loss_scale": 1.0,
        "perf/step_s": 0.512,
        "perf/tokens_per_s": 8000.0,
        "perf/tokens_per_s_per_device": 4000.0,
        "perf/tflops_per_device": 4.0,
        "perf/data_wait_pct": 25.0,
        "mem/host_rss_gib": 1.5,
        "data/supervised_pct": 97.65625,
    }


def test_utilisation_is_given_only_against_a_known_limit():
    metrics = step_metrics(replaced(ROW, device_peak_bytes=1 << 30, extra={"data/epoch": 1.5}), facts(peak_flops=16e12))
    assert metrics["perf/mfu_pct"] == 25.0
    assert metrics["mem/device_peak_gib"] == 1.0
    assert metrics["data/epoch"] == 1.5
    assert "perf/roof_pct" not in metrics
    metrics = step_metrics(ROW, facts(roof_flops=5e12))
    assert metrics["perf/roof_pct"] == 80.0
    assert "perf/mfu_pct" not in metrics


@pytest.mark.parametrize(("clipping", "clipped"), [(0.0, 0.0), (1.0, 1.0), (1.234, 0.0), (2.0, 0.0)])
def test_clip_frac_counts_steps_above_the_limit(clipping, clipped):
    assert step_metrics(ROW, facts(gradient_clipping=clipping))["optim/clip_frac"] == clipped


def test_an_interval_condenses_each_metric_by_its_rule():
    slow = replaced(ROW, step=11, consumed_tokens=45056, loss=4.812345, grad_norm=0.5, step_seconds=1.536, lr=3e-4)
    report = interval_of(ROW, slow)
    value = report.metrics
    assert value["progress/tokens"] == 45056
    assert value["train/loss"] == pytest.approx(5.812345)
    assert (value["optim/lr"], value["optim/grad_norm"], value["optim/clip_frac"]) == (3e-4, 0.5, 0.5)
    assert value["perf/step_s"] == pytest.approx(1.024)
    # 2 x 4096 tokens in 2.048 s
    assert value["perf/tokens_per_s"] == pytest.approx(4000.0)


def test_rates_of_an_interval_in_which_the_batch_grows():
    double = replaced(ROW, batch_size=256, step_seconds=0.768)
    value = interval_of(ROW, double).metrics
    assert value["train/batch_size"] == 256
    # 3 x 4096 tokens in 1.28 s
    assert value["perf/tokens_per_s"] == pytest.approx(9600.0)
    assert "| global batch size:   256 |" in iteration_line(interval_of(ROW, double), FACTS, datetime(2026, 8, 1))


def test_the_loss_of_further_tokens_is_shown_beside_the_main_one():
    assert "train/mtp_loss" not in step_metrics(ROW, FACTS)
    report = interval_of(replaced(ROW, mtp_loss=7.5))
    assert report.metrics["train/mtp_loss"] == 7.5
    line = iteration_line(report, FACTS, datetime(2026, 8, 1))
    assert "| lm loss: 6.812345E+00 | mtp loss: 7.500000E+00 | loss scale: 1.0 |" in line


def test_losses_that_are_not_finite_are_counted_and_left_out_of_the_mean():
    report = interval_of(replaced(ROW, loss=math.nan), replaced(ROW, loss=math.inf, skipped=True), ROW, nan=2)
    assert report.metrics["train/loss"] == pytest.approx(6.812345)
    assert (report.nan, report.skipped) == (2, 1)
    assert math.isnan(interval_of(replaced(ROW, loss=math.nan)).metrics["train/loss"])


def test_one_validation_set_is_eval_and_several_are_weighted_by_tokens():
    one = EvalResult(loss=math.log(8), tokens=100, num_bytes=300)
    assert eval_metrics({"validation": one}) == {
        "eval/loss": math.log(8),
        "eval/ppl": pytest.approx(8.0),
        "eval/tokens": 100,
        "eval/bits_per_byte": pytest.approx(1.0),
    }
    two = EvalResult(loss=math.log(2), tokens=300, num_bytes=300)
    several = eval_metrics({"code": one, "prose": two})
    assert several["eval/loss"] == pytest.approx((math.log(8) + 3 * math.log(2)) / 4)
    assert several["eval/bits_per_byte"] == pytest.approx((300 + 300) / 600)
    assert several["eval/code/loss"] == math.log(8)
    assert several["eval/prose/bits_per_byte"] == pytest.approx(1.0)
    unknown = eval_metrics({"code": one, "prose": EvalResult(1.0, 300)})
    assert "eval/bits_per_byte" not in unknown
    assert "eval/code/bits_per_byte" in unknown


def test_perplexity_of_a_diverged_model_is_infinite_not_an_error():
    assert EvalResult(1000.0, 1).ppl == math.inf
    assert EvalResult(math.inf, 1).ppl == math.inf
    assert math.isnan(EvalResult(math.nan, 1).ppl)


def test_named_sets_and_extra_metrics_have_rules():
    assert metric("eval/code/loss") is METRICS["eval/loss"]
    assert metric("data/epoch").summary is None


def test_every_metric_is_documented_with_its_unit():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    documented = dict(re.findall(r"^\| `([a-z]+/[a-z_]+)` \| ([^|]+?) \|", page, flags=re.MULTILINE))
    assert documented == {name: rules.unit for name, rules in METRICS.items()}


# --- log lines ------------------------------------------------------------------------------------------------------


def test_iteration_line_is_megatrons_byte_for_byte():
    line = iteration_line(interval_of(ROW), FACTS, datetime(2026, 8, 1, 12, 0, 0, 123456))
    assert line == (
        " [2026-08-01 12:00:00.123456] iteration       10/    1000 | consumed samples:         1280 |"
        " elapsed time per iteration (ms): 512.0 | throughput per GPU (TFLOP/s/GPU): 4.0 |"
        " learning rate: 1.500000E-04 | global batch size:   128 | lm loss: 6.812345E+00 | loss scale: 1.0 |"
        " grad norm: 1.234 | number of skipped iterations:   0 | number of nan iterations:   0 |"
        " samples per second: 250.000 | tokens per gpu per second (tgs): 4000.000 | TFLOPs: 4.00 |"
    )


def test_a_loss_that_is_not_finite_is_printed():
    line = iteration_line(interval_of(replaced(ROW, loss=math.nan), nan=1), FACTS, datetime(2026, 8, 1))
    assert "| lm loss: NAN |" in line
    assert "| number of nan iterations:   1 |" in line


def test_validation_lines_are_megatrons():
    result = EvalResult(loss=2.0, tokens=100, num_bytes=400)
    stream = io.StringIO()
    LogConsole(FACTS, stream).evaluation(100, {"validation": EvalResult(2.0, 100)})
    line = " validation loss at iteration 100 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert stream.getvalue() == f"{'-' * (len(line) + 1)}\n{line}\n{'-' * (len(line) + 1)}\n"
    assert validation_line(100, result, "code") == (
        " validation-code loss at iteration 100 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
        "lm loss bits per byte: 7.213475E-01 | "
    )
    stream = io.StringIO()
    LogConsole(FACTS, stream).evaluation(100, {"code": result, "prose": result})
    assert stream.getvalue().count("validation-code loss") == stream.getvalue().count("validation-prose loss") == 1


# --- live view ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [(io.StringIO(), "xterm", LogConsole), (Terminal(), "dumb", LogConsole), (Terminal(), "xterm", LiveConsole)],
)
def test_the_live_view_needs_a_capable_terminal(stream, term, kind, monkeypatch):
    monkeypatch.setenv("TERM", term)
    console = open_console(FACTS, 0, stream)
    console.close()
    assert type(console) is kind


def rendered(width, metrics=None, **changes):
    view = LiveView(facts(**changes), first_step=0)
    view.metrics = metrics or {}
    console = RichConsole(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view)
    return console.file.getvalue().splitlines()


def test_live_view_shows_progress_and_health_within_the_width():
    metrics = step_metrics(ROW, facts(roof_flops=5e12)) | {"progress/eta_s": 5025.4}
    wide = rendered(120, metrics, eval_interval=50, save_interval=100)
    assert re.fullmatch(r"tiny [━╸╺ ]+10/1,000  1%  ETA 1:23:45 *", wide[0])
    assert wide[1].strip() == (
        "starting  loss 6.8123  grad 1.23  lr 1.50e-04  8k tok/s  80% of roof  1.5 GiB  eval in 40  save in 90"
    )
    narrow = rendered(60, metrics, eval_interval=50, save_interval=100)
    assert narrow[1].strip() == "starting  loss 6.8123  grad 1.23  lr 1.50e-04  8k tok/s"
    assert all(len(line) <= 60 for line in narrow)
    assert len(wide) == len(narrow) == 2


def test_live_view_of_a_model_with_experts_shows_the_busiest():
    metrics = step_metrics(ROW, FACTS) | {"moe/max_over_mean": 1.649}
    assert "8k tok/s  busiest expert 1.6x  1.5 GiB" in rendered(120, metrics)[1]


def test_live_view_before_the_first_step():
    lines = rendered(80, eval_interval=50)
    assert lines[0].rstrip().endswith("0/1,000  0%  ETA -:--:--")
    assert lines[1].strip() == "starting  eval in 50"


def test_live_console_prints_above_the_view_and_gives_the_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = LiveConsole(FACTS, 0, stream)
    console.message("[bold]as it is[/bold]")
    console.step(step_metrics(ROW, FACTS) | {"progress/eta_s": 1.0})
    console.interval(interval_of(replaced(ROW, loss=math.nan, skipped=True), nan=1))
    console.evaluation(10, {"code": EvalResult(2.0, 100, 400)})
    console.phase("saving")
    console.close()
    shown = stream.getvalue()
    assert "[bold]as it is[/bold]\n" in shown
    assert "step 10: since the last report 1 losses were not finite and 1 steps were skipped" in shown
    assert "step 10  code loss 2.0000  ppl 7.39  bits/byte 0.7213" in shown
    assert "saving" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (87.46, "87.5"),
        (999.4, "999"),
        (999.6, "1k"),
        (12345, "12.3k"),
        (4.56e6, "4.56M"),
        (2.5e12, "2.5e+03G"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (86399, "23:59:59"), (90061, "1d 1:01:01"), (math.nan, "-:--:--")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
