"""What the exchange of an MoE layer costs on a real wire, against DeepSpeed's two layers and Megatron-core's.

Ranks are processes on hosts of ``network.py``: namespaces with shaped links, one thread per rank. All layers hold the
same weights, route the same tokens to the same experts and run forward and backward in fp32; those that drop nothing
are compared. *Exposed* time is the time of such a pass minus that of the same pass on a network that carries sizes and
counts but no rows (``payload_memory.py``), in the same round: the communication that the layer does not hide. The time
of a pass is that of the slowest rank, from a common barrier. Layers run in turn, round after round.

A. Exposed time of one layer on 4 hosts.
B. The ring alone against gloo's all_to_all_single, many exchanges in a row, so that what the token bucket lets pass at
   once (256 KiB) is small beside the whole. The line rate is that of the link: bytes out of a rank / seconds.
C. Bytes per token and direction, as rows of D fp32 numbers: counted by the dispatcher, and on the wire as the hosts'
   interfaces count, headers and acknowledgements included. The model is the expected number of rows under uniform
   routing that leave a rank, or a node (lines that say nodes): one for every other that has one of the token's experts.
D. Two nodes of 4 ranks that share their node's link: exposed time, for information.

Needs root and Linux (network namespaces, tc); without them it says SKIPPED and exits with 0. Takes about five minutes,
and means something on a quiet machine only: four ranks on two cores have none to spare.

    python benchmarks/moe_exchange.py --check
"""

import argparse
import contextlib
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import torch
from moe_peers import PEERS, Shape
from network import Network, Ranks, ended_by_signals, obstacle
from torch import Tensor

RANK_SCRIPT = Path(__file__).with_name("exchange_rank.py")
TITLE = """\
MoE exchange between hosts with shaped links: one layer, forward + backward, fp32, one thread per rank.
Peers as moe_peers.py runs them on a CPU: AutoEP's whole layer, its SwiGLU in plain PyTorch; megatron-core's alltoall
dispatcher around F.grouped_mm experts; deepspeed.moe as it is, padded to the fullest expert or with capacity 1.25."""
HEADLINE = Shape(tokens=1024, hidden=512, ffn=1024, experts=8, top_k=2, skew=0.2)
LESS_EXPOSED = {
    "deepspeed.moe": {200: 42, 500: 42},
    "deepspeed.moe cf 1.25": {200: 42, 500: 42},
    "AutoEP": {200: 25, 500: 42},
    "megatron-core": {200: 25, 500: 42},
}
"""Peer -> Mbit/s -> by how many percent less of the ring's communication has to be exposed."""
DROPPING = "deepspeed.moe cf 1.25"
RAW_KIB = (16, 128, 1024)
RAW_MIB = 8
"""What a rank sends in one timed series of raw exchanges."""
FEW_BYTES = [Shape(1024, 512, 64, 8, 2, 0.0), Shape(1024, 512, 64, 16, 4, 0.0)]
"""Layers whose bytes are counted on 4 ranks, one per node."""
NODES = Shape(tokens=512, hidden=512, ffn=64, experts=64, top_k=8, skew=0.0)
"""The layer for two nodes of 4 ranks."""


def main(argv: list[str]) -> int:
    made = harness.parser(__doc__, rounds=5)
    made.add_argument("--quick", action="store_true", help="two rounds and little data: does it run?")
    options = made.parse_args(argv)
    if options.quick:
        options.rounds = 2
    torch.set_num_threads(1)
    with ended_by_signals():
        if reason := obstacle():
            print(f"SKIPPED: {reason}")
            return 0
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("deepspeed", "megatron-core"))
        report = harness.Report(f"{TITLE}\n{versions}")
        with cluster(hosts=4) as ranks:
            compare_layers(report, ranks, options)
            compare_raw(report, ranks, 200, options)
            for shape in FEW_BYTES:
                count_bytes(report, ranks, shape)
        with cluster(hosts=8) as ranks:
            compare_raw(report, ranks, 100, options)
        with cluster(hosts=2, ranks_per_host=4) as ranks:
            count_node_bytes(report, ranks)
            compare_dispatchers(report, ranks, 400, options)
    return report.finish(options)


@contextlib.contextmanager
def cluster(hosts: int, ranks_per_host: int = 1) -> Iterator[Ranks]:
    """Ranks on a network of their own."""
    with Network(hosts) as network, Ranks(network, RANK_SCRIPT, ranks_per_host) as ranks:
        yield ranks


def compare_layers(report: harness.Report, ranks: Ranks, options: argparse.Namespace) -> None:
    """Part A."""
    names = ["ring", "all_to_all", *PEERS]
    different = max(ranks.call("difference", HEADLINE, [name for name in names if name != DROPPING]))
    report.add("A largest relative difference of the exact layers", "", different, at_most=1e-4)
    describe_padding(report, torch.tensor(ranks.call("load", HEADLINE)))
    for mbit in (200, 500):
        ranks.network.shape(mbit)
        passes = slowest_passes(ranks, HEADLINE, names, options.rounds)
        for name, samples in passes.items():
            report.add(f"A {mbit} Mbit/s, {name}: layer", "ms", [1e3 * shaped for shaped, _ in samples])
        exposed = {name: [shaped - zero for shaped, zero in samples] for name, samples in passes.items()}
        for name, samples in exposed.items():
            report.add(f"A {mbit} Mbit/s, {name}: exposed", "ms", [1e3 * s for s in samples])
        for peer, goals in LESS_EXPOSED.items():
            # Of the medians: a difference of two times can come out near zero in one round.
            less = 1 - statistics.median(exposed["ring"]) / statistics.median(exposed[peer])
            report.add(f"A {mbit} Mbit/s, ring: less than {peer}", "%", 100 * less, at_least=goals[mbit])


def describe_padding(report: harness.Report, load_PE: Tensor) -> None:
    """What the assignments of every rank to every expert make of DeepSpeed's two modes."""
    mean = load_PE.float().mean().item()
    report.add("A fullest expert / mean", "ratio", load_PE.sum(0).max().item() / load_PE.sum(0).float().mean().item())
    report.add("A deepspeed.moe: rows sent / needed", "ratio", load_PE.max().item() / mean)
    dropped = (load_PE - math.ceil(1.25 * mean)).clamp(min=0).sum().item()
    report.add(f"A {DROPPING}: assignments dropped", "%", 100 * dropped / load_PE.sum().item())


def compare_raw(report: harness.Report, ranks: Ranks, mbit: int, options: argparse.Namespace) -> None:
    """Part B."""
    ranks.network.shape(mbit)
    for kib in RAW_KIB:
        bytes_out = (ranks.size - 1) * kib * 1024
        exchanges = max(2, (RAW_MIB // (4 if options.quick else 1)) * 2**20 // bytes_out)
        # Small messages are over before the scheduler has run every rank: more rounds, not longer ones.
        rounds = options.rounds * (3 if kib == min(RAW_KIB) else 1)
        per_rank = ranks.call("time_raw", kib, exchanges, rounds)
        seconds = {
            name: [max(samples) / exchanges for samples in zip(*(result[name] for result in per_rank), strict=True)]
            for name in per_rank[0]
        }
        label, ideal = f"B {ranks.size} x {mbit} Mbit/s, {kib} KiB/pair", bytes_out * 8 / (mbit * 1e6)
        for name, samples in seconds.items():
            goal = {"at_least": 90.0} if name == "ring" and kib >= 128 else {}
            report.add(f"{label}: {name}", "% of line", [100 * ideal / s for s in samples], **goal)
        goal = {"at_most": 1.1} if kib == min(RAW_KIB) else {}
        report.add_ratio(f"{label}: time, ring / gloo", seconds["ring"], seconds["all_to_all_single"], **goal)


def count_bytes(report: harness.Report, ranks: Ranks, shape: Shape) -> None:
    """Part C with one rank per host: rows that leave a rank."""
    label, model = f"C top-{shape.top_k}/{shape.experts}, {ranks.size} ranks", rank_rows(shape, ranks.size)
    report.add(f"{label}: model", "rows/token", model)
    counts = ranks.call("count_bytes", shape, "ring")
    for where in ("counted", "wire"):
        rows = rows_per_token(sum(count[where] for count in counts) / ranks.size, shape)
        report.add(f"{label}: ring, {where}", "rows/token", rows, at_most=round(1.05 * model, 3))


def count_node_bytes(report: harness.Report, ranks: Ranks) -> None:
    """Part C with two nodes: rows that leave a node, and all that leave a rank."""
    nodes, per_node = len(ranks.network.names), ranks.ranks_per_host
    counts = {name: ranks.call("count_bytes", NODES, name) for name in ("hierarchical", "AutoEP")}
    # The ranks of a node share an interface, and each of them read it.
    wire = {
        name: rows_per_token(sum(count["wire"] for count in of_ranks[::per_node]) / ranks.size, NODES)
        for name, of_ranks in counts.items()
    }
    label, model = f"C top-{NODES.top_k}/{NODES.experts}, {nodes} nodes", node_rows(NODES, nodes)
    report.add(f"{label}: model", "rows/token", model)
    report.add(f"{label}: hierarchical, wire", "rows/token", wire["hierarchical"], at_most=round(1.05 * model, 3))
    report.add(f"{label}: AutoEP, wire", "rows/token", wire["AutoEP"])
    report.add(f"{label}: hierarchical / AutoEP", "ratio", wire["hierarchical"] / wire["AutoEP"], at_most=0.27)
    # What crossed once is handed on by the rank that received it, so more rows leave the ranks than without nodes.
    label, model = (
        f"C top-{NODES.top_k}/{NODES.experts}, {ranks.size} ranks",
        nodes_and_ranks_rows(NODES, nodes, per_node),
    )
    report.add(f"{label}: model", "rows/token", model)
    counted = rows_per_token(sum(count["counted"] for count in counts["hierarchical"]) / ranks.size, NODES)
    report.add(f"{label}: hierarchical, counted", "rows/token", counted, at_most=round(1.05 * model, 3))


def compare_dispatchers(report: harness.Report, ranks: Ranks, mbit: int, options: argparse.Namespace) -> None:
    """Part D."""
    ranks.network.shape(mbit)
    passes = slowest_passes(ranks, NODES, ["hierarchical", "ring", "all_to_all", "AutoEP"], options.rounds)
    for name, samples in passes.items():
        exposed = [1e3 * (shaped - zero) for shaped, zero in samples]
        report.add(f"D 2 x 4 ranks, {mbit} Mbit/s, {name}: exposed", "ms", exposed)


def slowest_passes(ranks: Ranks, shape: Shape, names: Sequence[str], rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """Layer -> per round the seconds of its slowest rank, on the shaped and on the zero-byte network."""
    per_rank = ranks.call("time_layers", shape, names, rounds)
    return {
        name: [tuple(map(max, zip(*passes, strict=True))) for passes in zip(*(r[name] for r in per_rank), strict=True)]
        for name in names
    }


def hit(shape: Shape, parts: int) -> float:
    """Probability that a token has an expert in one of ``parts`` equal parts of the experts."""
    outside = shape.experts - shape.experts // parts
    return 1 - math.comb(outside, shape.top_k) / math.comb(shape.experts, shape.top_k)


def rank_rows(shape: Shape, ranks: int) -> float:
    """Rows per token that leave a rank when each other rank gets a token at most once."""
    return (ranks - 1) * hit(shape, ranks)


def node_rows(shape: Shape, nodes: int) -> float:
    """Rows per token that leave a node when each other node gets a token at most once."""
    return (nodes - 1) * hit(shape, nodes)


def nodes_and_ranks_rows(shape: Shape, nodes: int, ranks_per_node: int) -> float:
    """Rows per token that leave a rank when the rank that a token reaches on another node hands it to its neighbours.

    Each node's neighbours are handed the same expected number: the token's own node, and every other.
    """
    return node_rows(shape, nodes) + nodes * (ranks_per_node - 1) * hit(shape, nodes * ranks_per_node)


def rows_per_token(sent: float, shape: Shape) -> float:
    """Bytes that a rank sent in a pass as rows of D fp32 numbers, per token and direction.

    The directions are to the experts and back, in the forward and in the backward pass.
    """
    return sent / (4 * shape.tokens * 4 * shape.hidden)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
