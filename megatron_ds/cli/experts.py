"""``megatron-ds experts``: the load of every expert at one step of a run, as a table, from the ledger alone."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ds.errors import ConfigError
from megatron_ds.train.ledger import read

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

HELP = "Show the load of every expert at a step of a run."
EXAMPLE = "megatron-ds experts --run runs/v2_tiny --step 200"
MOST_COLUMNS = 16
"""Experts up to which each has a column with its number; more are drawn as bars."""
BARS = " ▁▂▃▄▅▆▇█"
"""An empty place for no load, then eighths of ``FULL_BAR``."""
FULL_BAR = 2.0
"""Load / mean load that fills a bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", required=True, help="run directory, runs/NAME; the run may be going on")
    add("--step", type=int, metavar="N", help="step to show; by default the last one")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    step, record = find_record(args.run, args.step)
    # Here, since torch takes seconds to import and --help should not.
    from megatron_ds.train.expert_load import from_record

    load = from_record(record)
    console = Console(width=1000, highlight=False)  # wide enough for every table: its lines must not be broken
    console.print(f"{args.run}, step {step}: {heading(load)}\n", expert_table(load), end="")
    for line in totals(load):
        console.print(line)
    return 0


def find_record(run: Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """The record of the experts at ``step``, or the last one, with its step.

    Raises:
        ConfigError: There is no ledger, no expert, or no record of that step.
        DataError: The ledger is damaged.
    """
    try:
        rows = read(run / "ledger.jsonl")
    except OSError as error:
        raise ConfigError(
            f"{run / 'ledger.jsonl'}: cannot be read ({error.strerror}); give a run directory such as runs/NAME"
        ) from error
    records = {row["step"]: row["experts"] for row in rows if "experts" in row}
    if not records:
        raise ConfigError(
            f"--run {run}: its ledger knows no experts; give a run with --num-experts that has taken a step"
        )
    shown = max(records) if step is None else step
    if shown not in records:
        nearest = min(records, key=lambda known: abs(known - shown))
        raise ConfigError(f"--step {step}: the ledger has no experts of this step; the nearest is --step {nearest}")
    return shown, records[shown]


def heading(load: "ExpertLoad") -> str:
    """What the numbers in the table are."""
    num_experts = load.chosen_LE.shape[1]
    ranks = f" on {load.ranks} ranks" if load.ranks > 1 else ""
    if num_experts <= MOST_COLUMNS:
        return f"{num_experts} experts{ranks}, load / mean load of the layer (balance is 1.00)"
    return f"{num_experts} experts{ranks}, a bar for each, full at {FULL_BAR:g} times the mean load of the layer"


def expert_table(load: "ExpertLoad") -> Table:
    """One line per layer: its experts, how even they are, what was dropped, the biases, and the exchange."""
    from megatron_ds.train.expert_load import layer_figures

    figures, num_experts = layer_figures(load), load.chosen_LE.shape[1]
    as_numbers = num_experts <= MOST_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    experts = [str(index) for index in range(num_experts)] if as_numbers else [f"experts 0 to {num_experts - 1}"]
    balance = ["max/\nmean", "entropy", "dead", "dropped\n%", "bias\nmin", "bias\nmax", "ranks\nmax/mean"]
    for name in ("layer", *experts, *balance, "MB\nsent", "exchange\nms", "exposed\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, layer in enumerate(load.layers):
        factor_E = figures.load_factor_LE[row]
        table.add_row(
            str(layer),
            *([f"{factor:.2f}" for factor in factor_E.tolist()] if as_numbers else [bars(factor_E)]),
            f"{figures.max_over_mean_L[row]:.2f}",
            f"{figures.entropy_L[row]:.3f}",
            str(int(figures.dead_L[row])),
            f"{100 * figures.dropped_share_L[row]:.2f}",
            *(("-", "-") if load.bias_LE is None else (f"{b:+.3f}" for b in load.bias_LE[row].aminmax())),
            f"{figures.rank_max_over_mean_L[row]:.2f}",
            f"{load.bytes_sent_L[row] / 1e6:.2f}",
            f"{1000 * load.seconds_L[row]:.1f}",
            f"{1000 * load.exposed_seconds_L[row]:.1f}",
        )
    return table


def bars(factor_E: "Tensor") -> str:
    """One character per expert, as high as its load; only an expert without any has an empty place."""
    top = len(BARS) - 1
    heights = (factor_E / FULL_BAR * top).round().clamp(1, top) * (factor_E > 0)
    return "".join(BARS[int(height)] for height in heights)


def totals(load: "ExpertLoad") -> Iterator[str]:
    """The sums over all layers."""
    chosen_L = load.chosen_LE.sum(dim=1)
    assignments, dropped, count = int(chosen_L.sum()), int(load.dropped_LE.sum()), len(load.layers)
    even = len(set(chosen_L.tolist())) == 1
    yield f"assignments: {assignments:,}" + (
        f" = layers {count} x {int(chosen_L[0]):,} (tokens x topk)" if even else ""
    )
    yield f"dropped: {dropped:,} ({100 * dropped / max(assignments, 1):.2f} %)"
