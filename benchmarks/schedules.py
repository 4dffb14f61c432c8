"""What pipeline schedules cost: simulated, in real processes beside DeepSpeed's engine, and on slow links.

A. Simulated. p ranks, m micro-batches, v chunks per rank; a pass through a rank's whole stage takes F = 1 forward,
   I = 1 for the gradients of the inputs and W = 1 for those of the weights (B = I + W); messages take no time:

       schedule      makespan                      most activations on a rank, in those of a whole stage
       1f1b          3m + 3(p - 1)                 min(p, m)
       interleaved   3m + 3(p - 1)/v               min(p + (p - 1)/v, m)
       zb_h1         3m + p - 1                    min(p, m)      m >= p
       zb_v          3m + (p - 1)/2                min(p, m)      m >= 2p - 1
       zb_h1, zb_v   3m + 2p - 1 - m               min(p, m)      below that

   They hold exactly, so ZB-V holds p from m = p on. Torch's orders are simulated the same way. v = 1 is 1f1b, and a V
   has two chunks.
B. Our engine and DeepSpeed's, 4 processes with one thread each, over layers that sleep: per micro-batch and rank 20 ms
   forward and 40 ms backward, half of it for the weights. Step times, and how much larger the bubble is than simulated.
C. Our engine on hosts of ``network.py`` with links of 200 Mbit/s and activations of 1 MiB: with one process group for
   each direction, and with one for both. Needs root and Linux; without them the part says SKIPPED.

B and C run their contestants in turn, round after round, which takes about three minutes and means something on a quiet
machine only. ``schedule_processes.py`` says what they count.

    python benchmarks/schedules.py --check
"""

import importlib.metadata
import sys
from dataclasses import dataclass
from fractions import Fraction

import harness
from network import ended_by_signals
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from schedule_processes import compare_links, compare_steps
from schedule_references import BUBBLE, PEAK, torch_tables

from megatron_ds.pipeline.schedule import SCHEDULES, Table
from megatron_ds.pipeline.simulate import simulate

RANKS = (2, 4, 8, 16)
ROUNDS = (1, 2, 4, 8)
"""Micro-batches per rank."""
CONTESTANTS = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1), ("zb_v", 2))
"""Schedule and chunks per rank."""


def main(argv: list[str]) -> int:
    options = harness.parser(__doc__, rounds=5).parse_args(argv)
    versions = f"deepspeed {importlib.metadata.version('deepspeed')}"
    report = harness.Report(f"Pipeline schedules: A simulated, B in processes, C on links; {versions}")
    simulated(report)
    with ended_by_signals():
        compare_steps(report, options.rounds)
        compare_links(report, options.rounds)
    return report.finish(options)


# --- A. simulated ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Makespan and most activations, both exact, in a whole stage's."""

    makespan: Fraction
    peak: Fraction


def simulated(report: harness.Report) -> None:
    """Print all sizes; add the worst over the sizes of each schedule: off the formulas, or beside torch."""
    table = RichTable(box=box.SIMPLE_HEAD, title="A. bubble in % of the step / most activations in whole stages")
    for heading in ("p", "schedule", "v", *(f"m = {factor if factor > 1 else ''}p" for factor in ROUNDS)):
        table.add_column(heading, justify="left" if heading == "schedule" else "right", no_wrap=True)
    for name, chunks in CONTESTANTS:
        deviations, slower, larger = [], [], []
        for ranks in RANKS:
            cells = []
            for micro in (ranks * factor for factor in ROUNDS):
                size = ranks, micro, chunks
                ours = cost(name, SCHEDULES[name].tables(*size), chunks)
                torchs = cost(name, torch_tables(name, *size), chunks)
                formula = Cost(3 * micro + Fraction(BUBBLE[name](*size)), Fraction(PEAK[name](*size)))
                deviations += [abs(ours.makespan - formula.makespan), abs(ours.peak - formula.peak)]
                slower.append(ours.makespan / torchs.makespan)
                larger.append(ours.peak / torchs.peak)
                cells.append(f"{float(100 - 300 * micro / ours.makespan):.1f} / {float(ours.peak):g}")
            table.add_row(str(ranks), name, str(chunks), *cells, end_section=ranks == RANKS[-1])
        line = f"{name}, v = {chunks}"
        report.add(f"A {line}: largest deviation from the formulas", "stage", float(max(deviations)), at_most=0)
        report.add(f"A {line}: largest makespan / torch's", "ratio", float(max(slower)), at_most=1)
        report.add(f"A {line}: largest activations / torch's", "ratio", float(max(larger)), at_most=1)
    Console(width=132, highlight=False).print(table)


def cost(name: str, tables: list[Table], chunks: int) -> Cost:
    """Of tables in the place of a schedule's own; chunk passes take 1, so that the clock counts in whole numbers."""
    result = simulate(tables, chunks, SCHEDULES[name].placement)
    return Cost(Fraction(result.makespan) / chunks, Fraction(max(result.peak_activations)).limit_denominator(chunks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
