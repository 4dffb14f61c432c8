"""One rank of ``moe_exchange.py``: the layers that are compared, and the clocks and counters around them.

``moe_exchange.py`` starts this file in a namespace of ``network.py`` and calls the functions at its end by name.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moe_peers
import network
import torch
import torch.distributed as dist
from moe_peers import Layer, Problem, Shape
from payload_memory import PayloadMemory
from torch import Tensor, nn

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.model.moe.dispatch import Traffic, build_dispatcher
from megatron_ds.model.moe.experts import Experts
from megatron_ds.parallel.groups import Groups, distributed

SETTLE_SECONDS = 0.2
"""Time for the last queued bytes to leave an interface before its counter is read."""


class Rank:
    """The functions that ``moe_exchange.py`` calls by name, and the layers that are kept between the calls."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._problems: dict[Shape, Problem] = {}
        self._layers: dict[tuple[Shape, str], Layer] = {}

    def time_layers(self, shape: Shape, names: Sequence[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
        """Per layer and round: seconds of forward + backward on this network, and on one that carries no payload.

        All layers in turn, each on both networks, round after round, after a round that is not counted.
        """
        memories = {name: PayloadMemory() for name in names}
        for name, memory in memories.items():
            with memory.recorded():
                expected = self.run(shape, name)
            with memory.replayed():
                replayed = self.run(shape, name)
            assert all(map(torch.equal, expected, replayed)), f"{name} without a payload computes something else"
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name, memory in memories.items():
                shaped = self._seconds(self.run, shape, name)
                with memory.replayed():
                    zero_byte = self._seconds(self.run, shape, name)
                seconds[name].append((shaped, zero_byte))
        return {name: samples[1:] for name, samples in seconds.items()}

    def time_raw(self, kib: int, exchanges: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of ``exchanges`` exchanges in a row with ``kib`` KiB for every peer, by the ring and by gloo."""
        ranks = self.groups.world_size
        sent = torch.randn(ranks, kib * 256, generator=torch.Generator().manual_seed(self.groups.rank))
        received = {"ring": torch.empty_like(sent), "all_to_all_single": torch.empty_like(sent)}
        ring = self.groups.experts.flat
        contestants = {
            "ring": lambda: ring.exchange(list(sent), list(received["ring"])),
            "all_to_all_single": lambda: dist.all_to_all_single(received["all_to_all_single"], sent),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds + 1):
            for name, exchange in contestants.items():
                seconds[name].append(self._seconds(lambda exchange=exchange: [exchange() for _ in range(exchanges)]))
        assert torch.equal(*received.values()), "the ring delivers something else"
        return {name: samples[1:] for name, samples in seconds.items()}

    def count_bytes(self, shape: Shape, name: str) -> dict[str, int]:
        """Bytes that one pass of a layer sends, after a pass that opens the connections.

        Returns:
            ``counted`` by this rank's dispatcher (0 for a peer, which does not count), and ``wire``: what went through
            the interface of this rank's host, for all ranks there.
        """
        self.run(shape, name)
        traffic = getattr(self._layer(shape, name), "traffic", None)
        if traffic is not None:
            traffic.reset()
        before = self._settled_counter()
        self.run(shape, name)
        wire = self._settled_counter() - before
        return {"counted": 0 if traffic is None else traffic.bytes_sent, "wire": wire}

    def difference(self, shape: Shape, names: Sequence[str]) -> float:
        """Largest difference of outputs and input gradients from the first layer's, relative to the largest value."""
        first, *others = (self.run(shape, name) for name in names)
        return max(
            ((ours - theirs).abs().max() / ours.abs().max()).item()
            for other in others
            for ours, theirs in zip(first, other, strict=True)
        )

    def load(self, shape: Shape) -> list[int]:
        """Assignments to every expert by this rank's tokens."""
        problem = self._problem(shape)
        _, expert_TK = moe_peers.route(problem, problem.router_ED, problem.x_TD)
        return torch.bincount(expert_TK.flatten(), minlength=shape.experts).tolist()

    def run(self, shape: Shape, name: str) -> tuple[Tensor, Tensor]:
        """Forward and backward through a layer; returns its output and the gradient of its input."""
        problem, layer = self._problem(shape), self._layer(shape, name)
        x_TD = problem.x_TD.clone().requires_grad_()
        for parameter in layer.parameters:
            parameter.grad = None
        with moe_peers.cuda_stand_ins() if name == "megatron-core" else contextlib.nullcontext():
            y_TD = layer.forward(x_TD)
            y_TD.backward(problem.grad_TD)
        return y_TD.detach(), x_TD.grad

    def _problem(self, shape: Shape) -> Problem:
        if shape not in self._problems:
            self._problems[shape] = moe_peers.make_problem(shape, self.groups.rank, self.groups.world_size)
        return self._problems[shape]

    def _layer(self, shape: Shape, name: str) -> Layer:
        if (shape, name) not in self._layers:
            problem = self._problem(shape)
            build = moe_peers.PEERS.get(name) or functools.partial(our_layer, dispatcher=name, groups=self.groups)
            self._layers[shape, name] = build(problem)
        return self._layers[shape, name]

    @staticmethod
    def _seconds(work: Callable[..., object], *arguments: object) -> float:
        dist.barrier()
        started = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - started

    @staticmethod
    def _settled_counter() -> int:
        dist.barrier()
        time.sleep(SETTLE_SECONDS)
        sent = network.sent_bytes()
        dist.barrier()
        return sent


@dataclass(frozen=True)
class OurLayer(Layer):
    """Ours, which counts what it sends."""

    traffic: Traffic


def our_layer(problem: Problem, dispatcher: str, groups: Groups) -> OurLayer:
    """Router, exchange and experts of ``megatron_ds``, with one of its dispatchers."""
    shape = problem.shape
    moe = MoEConfig(
        num_experts=shape.experts, moe_router_topk=shape.top_k, moe_ffn_hidden_size=shape.ffn, dispatcher=dispatcher
    )
    exchange = build_dispatcher(moe, groups.experts, shape.experts)
    experts = Experts(problem.local_experts, shape.hidden, shape.ffn, moe.experts)
    with torch.no_grad():
        experts.gate_up.copy_(problem.gate_up.view_as(experts.gate_up))
        experts.down.copy_(problem.down)
    router_ED = nn.Parameter(problem.router_ED)

    def forward(x_TD: Tensor) -> Tensor:
        return exchange(x_TD, *moe_peers.route(problem, router_ED, x_TD), experts)

    return OurLayer(forward, [router_ED, *experts.parameters()], exchange.traffic)


def main() -> None:
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    parallel = ParallelConfig(
        expert_model_parallel_size=size, expert_ranks_per_node=per_node, distributed_timeout_minutes=5.0
    )
    with distributed(parallel) as groups:
        rank = Rank(groups)
        called = (rank.time_layers, rank.time_raw, rank.count_bytes, rank.difference, rank.load)
        network.serve({function.__name__: function for function in called})


if __name__ == "__main__":
    main()
