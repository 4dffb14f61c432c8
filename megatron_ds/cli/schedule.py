"""``megatron-ds schedule``: what a pipeline schedule costs, without running it: order, bubble and memory of every rank.

The tables are those that training runs. Their course in time is simulated with durations that the user may give, and
drawn on request. The sizes come from flags, or from the configuration of a run.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ds.config.values import nearest
from megatron_ds.errors import ConfigError
from megatron_ds.pipeline import draw
from megatron_ds.pipeline.schedule import SCHEDULES
from megatron_ds.pipeline.simulate import Durations, Simulation, simulate

HELP = "Show and draw a pipeline schedule: order, bubble and activations of every rank."
EXAMPLE = "megatron-ds schedule --name interleaved --pp 4 --microbatches 8 --vpp 2 --svg schedule.svg"
MICROSECONDS = 1000.0
"""That a unit of time has in the trace."""


@dataclass(frozen=True)
class Sizes:
    """A schedule and what its tables depend on."""

    name: str
    ranks: int
    micro_batches: int
    chunks: int

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks per rank" if self.chunks > 1 else ""
        return f"{self.name}, {_count(self.ranks, 'rank')}, {_count(self.micro_batches, 'micro-batch')}{chunks}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    add("--name", metavar="NAME", help=f"schedule: {', '.join(SCHEDULES)}")
    add("--pp", type=_size, metavar="P", help="pipeline ranks")
    add("--microbatches", type=_size, metavar="M", help="micro-batches of a step")
    add("--vpp", type=_size, metavar="V", help="model chunks on each rank; by default as few as the schedule can have")
    add(
        "--deepspeed_config", type=Path, metavar="FILE", help="take these sizes from the configuration of a run instead"
    )
    add("--world-size", type=_size, metavar="N", help="ranks of that run, on which its micro-batches depend")
    halves = {"forward": "forward pass", "backward-input": "backward pass of the inputs"}
    for name, what in (halves | {"backward-weight": "backward pass of the weights"}).items():
        add(
            f"--{name}", type=_duration, metavar="T", default=1.0, help=f"time of a {what} through all chunks of a rank"
        )
    add("--latency", type=_latency, metavar="T", default=0.0, help="time of a message between ranks, by default 0")
    add("--svg", type=Path, metavar="FILE", help="also draw it")
    add("--trace", type=Path, metavar="FILE", help="also write it as a trace for chrome://tracing or ui.perfetto.dev")


def run(args: argparse.Namespace) -> int:
    """Simulate, write the files, print."""
    sizes = _from_configuration(args) if args.deepspeed_config else _from_flags(args)
    schedule = SCHEDULES[sizes.name]
    if problem := schedule.problem(sizes.ranks, sizes.micro_batches, sizes.chunks):
        raise ConfigError(f"{sizes.name}: {problem}")
    durations = Durations(args.forward, args.backward_input, args.backward_weight, args.latency)
    tables = schedule.tables(sizes.ranks, sizes.micro_batches, sizes.chunks)
    result = simulate(tables, sizes.chunks, schedule.placement, durations.per_chunk(sizes.chunks))
    plain = simulate(SCHEDULES["1f1b"].tables(sizes.ranks, sizes.micro_batches, 1), durations=durations)

    if args.svg:
        title = f"{sizes}: bubble {_percent(result.mean_bubble)}"
        _write("--svg", args.svg, draw.svg(result.spans, title=title, num_chunks=sizes.chunks))
    if args.trace:
        trace = draw.chrome_trace(result.spans, title=str(sizes), num_chunks=sizes.chunks, microseconds=MICROSECONDS)
        _write("--trace", args.trace, json.dumps(trace))

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{sizes}\n{draw.notation(tables, sizes.chunks)}\n", markup=False)
    for line in draw.order_lines(tables, sizes.chunks, console.width):
        console.print(line, markup=False)
    console.print(_rank_table(result))
    console.print("\n".join(_totals(result, plain, durations)), markup=False)
    return 0


def _rank_table(result: Simulation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("rank", "bubble", "peak activations"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, (bubble, peak) in enumerate(zip(result.bubble, result.peak_activations, strict=True)):
        table.add_row(str(rank), _percent(bubble), f"{peak:.4g}")
    return table


def _totals(result: Simulation, plain: Simulation, durations: Durations) -> list[str]:
    """The whole pipeline, beside 1F1B with the same durations."""
    times = f"forward {durations.forward:g}, backward {durations.backward_input:g} + {durations.backward_weight:g}"
    return [
        f"makespan: {result.makespan:.6g} (1f1b: {plain.makespan:.6g})",
        f"bubble: {_percent(result.mean_bubble)} (1f1b: {_percent(plain.mean_bubble)})",
        f"peak activations: {max(result.peak_activations):.4g} (1f1b: {max(plain.peak_activations):.4g}), "
        "in those of one micro-batch in all layers of a rank",
        f"times of a rank's layers: {times}, latency {durations.latency:g}",
    ]


# --- sizes ----------------------------------------------------------------------------------------------------------


def _from_flags(args: argparse.Namespace) -> Sizes:
    given = {"--name": args.name, "--pp": args.pp, "--microbatches": args.microbatches}
    if missing := [flag for flag, value in given.items() if value is None]:
        raise ConfigError(f"{missing[0]} is missing; give it, or --deepspeed_config FILE and --world-size N")
    if args.world_size is not None:
        raise ConfigError("--world-size belongs to --deepspeed_config; give the ranks of the pipeline as --pp")
    if args.name not in SCHEDULES:
        meant = nearest(args.name, SCHEDULES)
        hint = f"did you mean {meant}?" if meant else f"choose {', '.join(SCHEDULES)}"
        raise ConfigError(f"--name {args.name}: no such schedule; {hint}")
    return Sizes(args.name, args.pp, args.microbatches, args.vpp or SCHEDULES[args.name].chunks[0])


def _from_configuration(args: argparse.Namespace) -> Sizes:
    given = {"--name": args.name, "--pp": args.pp, "--microbatches": args.microbatches, "--vpp": args.vpp}
    if surplus := [flag for flag, value in given.items() if value is not None]:
        raise ConfigError(f"{surplus[0]} is what --deepspeed_config says; leave one of them out")
    if args.world_size is None:
        raise ConfigError("--deepspeed_config needs --world-size: the micro-batches depend on the data-parallel ranks")
    from megatron_ds.config.load import load_config  # here, since --help should not wait for the schema

    config = load_config(["--deepspeed_config", str(args.deepspeed_config)], world_size=args.world_size).config
    parallel, micro_batches = config.megatron_ds.parallel, config.gradient_accumulation_steps
    assert micro_batches is not None, "a loaded configuration is resolved"
    return Sizes(parallel.schedule.kind, parallel.pipeline_model_parallel_size, micro_batches, parallel.num_chunks)


# --- values ---------------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def _latency(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not 0 <= time < math.inf:
        raise argparse.ArgumentTypeError(f"must be a time of 0 or more, not {text}")
    return time


def _duration(text: str) -> float:
    time = _latency(text)
    if time == 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return time


def _write(flag: str, path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _percent(share: float) -> str:
    return f"{100 * abs(share):.1f} %"  # abs, since no idle time may come out as -0.0


def _count(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("h") else "s"
    return f"{number} {thing}{plural if number > 1 else ''}"
