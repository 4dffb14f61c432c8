"""What every benchmark shares: paired timing, the table, --json and --check, and the facts of the machine.

Contestants run in turn, round after round in one process, and a ratio is taken within a round: what else the machine
does then hits both sides alike. Times are CPU seconds of this process on one thread, so waiting for a busy core does
not count. A measure may state a goal; ``--check`` exits with 1 when one is missed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    name: str
    unit: str
    samples: Sequence[float]
    at_least: float | None = None
    """Goal for the median, from below."""
    at_most: float | None = None
    """Goal for the median, from above."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal; true without one."""
        above = self.at_least is None or self.median >= self.at_least
        return above and (self.at_most is None or self.median <= self.at_most)

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclass
class Report:
    """The measures of one benchmark."""

    title: str
    measures: list[Measure] = field(default_factory=list)

    def add(self, name: str, unit: str, samples: Sequence[float] | float, **goal: float) -> None:
        """Add a line; ``goal`` is at_least=... or at_most=..."""
        samples = [samples] if isinstance(samples, int | float) else list(samples)
        self.measures.append(Measure(name, unit, samples, **goal))

    def add_ratio(self, name: str, numerators: Sequence[float], denominators: Sequence[float], **goal: float) -> None:
        """Add the ratio of two contestants, round by round."""
        self.add(name, "ratio", [a / b for a, b in zip(numerators, denominators, strict=True)], **goal)

    def finish(self, options: argparse.Namespace) -> int:
        """Print the table and the machine, write --json; returns the exit code that --check asks for."""
        facts = machine_facts()
        console = Console(width=132, highlight=False)
        console.print(self.title, self._table())
        console.print(", ".join(f"{name}: {value}" for name, value in facts.items()), soft_wrap=True)
        if options.json:
            lines = [vars(m) | {"median": m.median, "goal": m.goal, "met": m.met} for m in self.measures]
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"title": self.title, "machine": facts, "measures": lines}, indent=1))
        missed = [m.name for m in self.measures if not m.met]
        if missed and options.check:
            print(f"error: missed goals: {'; '.join(missed)}", file=sys.stderr)
        return 1 if missed and options.check else 0

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("measure", "median", "min", "max", "unit", "goal", ""):
            number = heading in ("median", "min", "max", "goal")
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for measure in self.measures:
            spread = (measure.median, min(measure.samples), max(measure.samples))
            verdict = "" if not measure.goal else "ok" if measure.met else "MISSED"
            table.add_row(measure.name, *(f"{x:,.4g}" for x in spread), measure.unit, measure.goal, verdict)
        return table


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has; ``description`` is the benchmark's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds, by default {rounds}")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every sample to FILE")
    made.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    return made


def paired_seconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contestant per round, all of them in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: samples[1:] for name, samples in seconds.items()}


def machine_facts() -> dict[str, str]:
    """What a reader must know to compare the numbers."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else "unknown",
        "cores": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def memory_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024
