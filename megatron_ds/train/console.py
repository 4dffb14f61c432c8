"""What a person sees: Megatron's log lines in a file or a pipe, a live view in a terminal.

Both consoles have the same methods and receive the same metrics. ``LogConsole`` prints one line an interval in the byte
format of Megatron-LM, with the three fields that Megatron-DeepSpeed appends, so that existing log parsers work.
``LiveConsole`` redraws two lines at the bottom of the terminal: how far the run is, and how it is doing; fields that do
not fit into the width are left out, the least important first.
"""

import atexit
import math
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_ds.train.metrics import EvalResult, IntervalReport, RunFacts, Value

SEPARATOR = "  "


class Console(Protocol):
    """Where a run shows itself."""

    def message(self, text: str) -> None:
        """Print text as it is."""

    def step(self, metrics: Mapping[str, Value]) -> None:
        """Take note of an optimizer step."""

    def interval(self, report: IntervalReport) -> None:
        """Show the steps since the last interval."""

    def evaluation(self, step: int, results: Mapping[str, EvalResult]) -> None:
        """Show the result of an evaluation."""

    def phase(self, name: str) -> None:
        """Show what the run is busy with now."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_console(facts: RunFacts, first_step: int, stream: TextIO) -> Console:
    """A live view where ``stream`` is a capable terminal, log lines elsewhere."""
    live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return LiveConsole(facts, first_step, stream) if live else LogConsole(facts, stream)


# --- log lines ------------------------------------------------------------------------------------------------------


class LogConsole:
    """One line an interval, for files, pipes and batch systems."""

    def __init__(self, facts: RunFacts, stream: TextIO) -> None:
        self._facts = facts
        self._stream = stream

    def message(self, text: str) -> None:
        """Print it at once: a log is read while it grows."""
        print(text, file=self._stream, flush=True)

    def step(self, metrics: Mapping[str, Value]) -> None:
        """Nothing: a line covers an interval."""

    def interval(self, report: IntervalReport) -> None:
        """Print Megatron's line for the interval."""
        self.message(iteration_line(report, self._facts, datetime.now()))

    def evaluation(self, step: int, results: Mapping[str, EvalResult]) -> None:
        """Print Megatron's validation line for each set, between dashes."""
        for name, result in results.items():
            line = validation_line(step, result, name if len(results) > 1 else None)
            rule = "-" * (len(line) + 1)
            self.message(f"{rule}\n{line}\n{rule}")

    def phase(self, name: str) -> None:
        """Nothing: the lines say it when it is over."""

    def close(self) -> None:
        """Nothing to undo."""


def iteration_line(report: IntervalReport, facts: RunFacts, now: datetime) -> str:
    """Megatron-LM's line for the steps of an interval.

    Loss, times and rates are means over the interval, the others the newest values. A loss that was never finite is
    printed as NAN instead of being left out.
    """
    value = report.metrics
    seconds = value["perf/step_s"]
    fields = [
        f"iteration {value['progress/step']:8d}/{facts.train_iters:8d}",
        f"consumed samples: {value['progress/samples']:12d}",
        f"elapsed time per iteration (ms): {seconds * 1000.0:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {value['perf/tflops_per_device']:.1f}",
        f"learning rate: {value['optim/lr']:.6E}",
        f"global batch size: {value['train/batch_size']:5d}",
        f"lm loss: {value['train/loss']:.6E}",
        *([f"mtp loss: {value['train/mtp_loss']:.6E}"] if "train/mtp_loss" in value else []),
        f"loss scale: {value['optim/loss_scale']:.1f}",
        f"grad norm: {value['optim/grad_norm']:.3f}",
        f"number of skipped iterations: {report.skipped:3d}",
        f"number of nan iterations: {report.nan:3d}",
        f"samples per second: {value['perf/tokens_per_s'] / facts.seq_length:.3f}",
        f"tokens per gpu per second (tgs): {value['perf/tokens_per_s_per_device']:.3f}",
        f"TFLOPs: {value['perf/tflops_per_device']:.2f}",
    ]
    return f" [{now:%Y-%m-%d %H:%M:%S.%f}]" + "".join(f" {entry} |" for entry in fields)


def validation_line(step: int, result: EvalResult, name: str | None) -> str:
    """Megatron-LM's validation line; ``name`` is given when there are several sets."""
    line = (
        f" validation{f'-{name}' if name else ''} loss at iteration {step} | "
        f"lm loss value: {result.loss:.6E} | lm loss PPL: {result.ppl:.6E} | "
    )
    if result.bits_per_byte is not None:
        line += f"lm loss bits per byte: {result.bits_per_byte:.6E} | "
    return line


# --- live view ------------------------------------------------------------------------------------------------------


class LiveConsole:
    """Two lines that redraw themselves below everything that was printed."""

    def __init__(self, facts: RunFacts, first_step: int, stream: TextIO) -> None:
        self._view = LiveView(facts, first_step)
        self._console = RichConsole(file=stream, highlight=False)
        self._live = Live(self._view, console=self._console, refresh_per_second=4)
        self._live.start()
        # An exception on its way out of the process would leave the cursor hidden.
        atexit.register(self.close)

    def message(self, text: str) -> None:
        """Print above the view."""
        self._console.print(Text(text), soft_wrap=True)

    def step(self, metrics: Mapping[str, Value]) -> None:
        """Hand the newest metrics to the view."""
        self._view.metrics = dict(metrics)

    def interval(self, report: IntervalReport) -> None:
        """Nothing in a good interval, for the view has it all; what went wrong is printed and stays."""
        if report.nan or report.skipped:
            self.message(
                f"step {report.metrics['progress/step']}: since the last report {report.nan} losses were not finite "
                f"and {report.skipped} steps were skipped"
            )

    def evaluation(self, step: int, results: Mapping[str, EvalResult]) -> None:
        """Print a line for each set."""
        for name, result in results.items():
            parts = [f"step {step}", f"{name} loss {result.loss:.4f}", f"ppl {result.ppl:.2f}"]
            if result.bits_per_byte is not None:
                parts.append(f"bits/byte {result.bits_per_byte:.4f}")
            self.message(SEPARATOR.join(parts))

    def phase(self, name: str) -> None:
        """Begin the second line with it."""
        self._view.phase = name

    def close(self) -> None:
        """Leave the last view on the screen and give the cursor back."""
        self._live.stop()
        atexit.unregister(self.close)


class LiveView:
    """The two lines, rendered at the terminal's present width."""

    def __init__(self, facts: RunFacts, first_step: int) -> None:
        self.phase = "starting"
        self.metrics: dict[str, Value] = {}
        self._facts = facts
        self._first_step = first_step

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        facts, step = self._facts, self.metrics.get("progress/step", self._first_step)
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        eta = duration(self.metrics["progress/eta_s"]) if "progress/eta_s" in self.metrics else "-:--:--"
        head.add_row(
            Text(facts.name, style="bold"),
            ProgressBar(total=facts.train_iters, completed=step),
            Text(f"{step:,}/{facts.train_iters:,}  {100 * step / facts.train_iters:.0f}%  ETA {eta}"),
        )
        yield head
        yield Text(fit(self._fields(step), options.max_width), no_wrap=True, overflow="crop")

    def _fields(self, step: int) -> list[str]:
        """The second line's fields, the most important first."""
        value, facts, fields = self.metrics, self._facts, [self.phase]
        if value:
            fields += [
                f"loss {value['train/loss']:.4f}",
                f"grad {value['optim/grad_norm']:.2f}",
                f"lr {value['optim/lr']:.2e}",
                f"{short(value['perf/tokens_per_s'])} tok/s",
            ]
            for name, label in (("perf/mfu_pct", "MFU"), ("perf/roof_pct", "of roof")):
                if name in value:
                    fields.append(f"{value[name]:.0f}% {label}")
            if "moe/max_over_mean" in value:
                fields.append(f"busiest expert {value['moe/max_over_mean']:.1f}x")
            memory = value.get("mem/device_peak_gib", value["mem/host_rss_gib"])
            fields.append(f"{memory:.1f} GiB")
        for label, every in (("eval", facts.eval_interval), ("save", facts.save_interval)):
            if every is not None:
                fields.append(f"{label} in {every - step % every}")
        return fields


def fit(fields: list[str], width: int) -> str:
    """As many fields as the width holds."""
    line = fields[0]
    for entry in fields[1:]:
        if len(line) + len(SEPARATOR) + len(entry) > width:
            break
        line += SEPARATOR + entry
    return line


def short(value: float) -> str:
    """A number in four characters or so: 87, 950, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front of long ones."""
    if not math.isfinite(seconds):
        return "-:--:--"
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
