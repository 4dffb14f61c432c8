"""``megatron-ds plan``: how a run is laid out over its ranks and whether it fits their memory, without starting it."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ds.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ds.config.model_schema import ModelConfig
    from megatron_ds.config.schema import RunConfig
    from megatron_ds.model.memory import Activations, Held, StateBytes
    from megatron_ds.parallel.topology import Topology
    from megatron_ds.pipeline.schedule import Table as OrderTable

HELP = "Show the ranks of a configuration and the memory that each needs."
EXAMPLE = "megatron-ds plan --deepspeed_config ds_configs/v3.json --world-size 1024 --memory 80"
GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    add("--deepspeed_config", type=Path, metavar="FILE", required=True, help="configuration of the run")
    add("--world-size", type=int, metavar="N", required=True, help="ranks that the run would have")
    add("--memory", type=float, metavar="GB", default=80.0, help="of one device, 1 GB = 10^9 bytes (default 80)")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of pretrain.py, after --")


def run(args: argparse.Namespace) -> int:
    """Print ranks and memory; 1 if a rank needs more than it has."""
    # Here, since torch takes seconds to import and --help should not.
    from megatron_ds.config.load import load_config
    from megatron_ds.config.resolve import with_vocabulary
    from megatron_ds.data.tokenizer import Tokenizer

    if args.world_size < 1:
        raise ConfigError(f"--world-size {args.world_size}: must be 1 or more")
    flags = ["--deepspeed_config", str(args.deepspeed_config), *args.flags]
    config = load_config(flags, prog="megatron-ds plan", world_size=args.world_size).config
    if config.megatron_ds.model.vocab_size is None:
        tokenizer = Tokenizer.load(config.megatron_ds.data.tokenizer)
        config = with_vocabulary(config, tokenizer.vocab_size, tokenizer.eod_id)
    shares = rank_shares(config, args.world_size)
    console = Console(width=1000, highlight=False)  # wide enough for every table: its lines must not be broken
    for line in heading(config, args.world_size):
        console.print(line)
    console.print(share_table(shares, args.memory), end="")
    fullest = max(shares, key=lambda share: share.total)
    needs = f"pipeline rank {fullest.pipe} needs most: {fullest.total / GB:.1f} of {args.memory:g} GB"
    console.print(f"{needs}; activations are an estimate, buffers and workspace are not counted")
    if fullest.total <= args.memory * GB:
        return 0
    console.print("does not fit: use more ranks or expert ranks, recompute_granularity full, or a smaller micro batch")
    return 1


@dataclass(frozen=True)
class RankShare:
    """What each rank of one pipeline rank holds."""

    pipe: int
    layers: list[str]
    """What each of its chunks holds."""
    held: "Held"
    states: "StateBytes"
    activations: float
    """Most bytes at once, an estimate."""

    @property
    def total(self) -> float:
        """Bytes of everything."""
        return sum(self.states) + self.activations


def topology_of(config: "RunConfig", world_size: int) -> "Topology":
    """The grid of the run's ranks."""
    from megatron_ds.parallel.topology import Topology

    parallel = config.megatron_ds.parallel
    return Topology.of_world(
        world_size,
        pipe=parallel.pipeline_model_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
    )


def rank_shares(config: "RunConfig", world_size: int) -> list[RankShare]:
    """The share of every pipeline rank under a resolved configuration whose vocabulary is known."""
    from megatron_ds.model.cost import layer_costs
    from megatron_ds.model.memory import Activations, entry_activations, stage_parameters, state_bytes
    from megatron_ds.pipeline.partition import stage_bounds
    from megatron_ds.pipeline.schedule import SCHEDULES

    ours, topology = config.megatron_ds, topology_of(config, world_size)
    model, moe, parallel, ranks = ours.model, ours.moe, ours.parallel, topology.pipe
    chunks, schedule = parallel.num_chunks, SCHEDULES[parallel.schedule.kind]
    bounds = stage_bounds(
        layer_costs(model, moe), model.num_layers, ranks * chunks, parallel.pipeline_model_parallel_layout
    )
    stages = [[schedule.placement.stage(rank, chunk, ranks) for chunk in range(chunks)] for rank in range(ranks)]
    activations = entry_activations(
        model, moe, parallel,
        tokens=config.train_micro_batch_size_per_gpu * model.seq_length,
        element=4 if config.dtype_name == "fp32" else 2,
        recompute=ours.training.recompute_granularity,
    )  # fmt: skip
    tables = schedule.tables(ranks, config.gradient_accumulation_steps, chunks)
    held = stage_parameters(model, moe, parallel, bounds, stages)
    shares = []
    for pipe, own in enumerate(stages):
        entries = [range(bounds[stage], bounds[stage + 1]) for stage in own]
        of_chunks = [sum((activations[entry] for entry in chunk), Activations()) for chunk in entries]
        states = state_bytes(
            held[pipe], data=topology.data, expert=topology.expert,
            dtype_name=config.dtype_name, zero_stage=config.zero_optimization.stage,
        )  # fmt: skip
        layers = [describe_entries(chunk, model) for chunk in entries]
        shares.append(RankShare(pipe, layers, held[pipe], states, peak_activations(tables[pipe], of_chunks)))
    return shares


def describe_entries(entries: range, model: "ModelConfig") -> str:
    """A stretch of the layer list in words: "embedding, 0-3", "60, norm, mtp, output"."""
    layers = range(max(entries.start - 1, 0), min(entries.stop - 1, model.num_layers))
    words = ["embedding"] if entries.start == 0 else []
    if layers:
        words.append(f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}")
    if entries.stop - 1 > model.num_layers:
        words += ["norm", "mtp", "output"] if model.mtp_num_layers else ["norm", "output"]
    return ", ".join(words) or "nothing"


def peak_activations(table: "OrderTable", chunks: "list[Activations]") -> float:
    """Most bytes of activations alive at once when a rank runs its passes in the order of ``table``."""
    alive = peak = 0.0
    for compute in table:
        chunk = chunks[compute.chunk]
        if compute.kind == "forward":
            alive += chunk.kept
            peak = max(peak, alive)
        elif compute.kind == "backward":
            peak = max(peak, alive + chunk.working)
            alive -= chunk.kept
        elif compute.kind == "backward_input":
            peak = max(peak, alive + max(chunk.working, chunk.deferred))
            alive += chunk.deferred - chunk.kept
        else:
            alive -= chunk.deferred
    return peak


def heading(config: "RunConfig", world_size: int) -> list[str]:
    """The model, the axes and who is a peer of rank 0."""
    from megatron_ds.model.cost import active_parameters, num_parameters, parameter_counts

    ours, topology = config.megatron_ds, topology_of(config, world_size)
    blocks = parameter_counts(ours.model, ours.moe)["mtp"]
    with_blocks = f", {blocks:,} of them in MTP blocks" if blocks else ""
    active = f", {active_parameters(ours.model, ours.moe):,} active" if ours.moe else ""
    parallel, micro = ours.parallel, config.train_micro_batch_size_per_gpu
    axes = [axis for axis in ("tensor", "expert", "data", "pipe") if getattr(topology, axis) > 1]
    return [
        f"{num_parameters(ours.model, ours.moe):,} parameters{with_blocks}{active}",
        f"{topology.describe()}, {config.dtype_name}, ZeRO-{config.zero_optimization.stage}, "
        f"schedule {parallel.schedule.kind}, chunks per rank {parallel.num_chunks}, "
        f"recompute {ours.training.recompute_granularity or 'none'}",
        f"batch {config.train_batch_size} = micro batch {micro} x {config.gradient_accumulation_steps} micro-batches x "
        f"{topology.data} data ranks, {ours.model.seq_length} tokens each",
        *(f"rank 0 shares the {axis} axis with {_short(topology.peers(0, axis))}" for axis in axes),
    ]


def _short(ranks: list[int]) -> str:
    """Equally spaced ranks in a few words."""
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, {ranks[2]} ... {ranks[-1]}"


def share_table(shares: list[RankShare], memory: float) -> Table:
    """One line per pipeline rank; its tensor and data ranks need the same."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    sizes = ("weights\nGB", "gradients\nGB", "optimizer\nGB", "activations\nGB", "total\nGB", f"of {memory:g} GB\n%")
    table.add_column("pipe")
    table.add_column("layers by chunk", no_wrap=True)
    for name in ("parameters\nof a rank", "of these\nexperts", *sizes):
        table.add_column(name, justify="right", no_wrap=True)
    for share in shares:
        bytes_of = (*share.states, share.activations, share.total)
        table.add_row(
            str(share.pipe),
            " | ".join(share.layers),
            f"{sum(share.held):,}",
            f"{share.held.experts:,}",
            *(f"{size / GB:.2f}" for size in bytes_of),
            f"{100 * share.total / (memory * GB):.0f}",
        )
    return table
