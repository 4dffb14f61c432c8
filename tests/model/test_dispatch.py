"""Every dispatcher, on 1 to 8 ranks, against all experts on all tokens in float64: outputs and all gradients.

One call of ``run_ranks`` for each world size runs all cases; a test then compares one case of one dispatcher.
"""

import contextlib
import functools
import time
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.dispatch import build_dispatcher
from megatron_ds.model.moe.experts import Experts
from megatron_ds.parallel.deferred import deferring

RANKS_PER_NODE = {2: 2, 3: 3, 4: 2, 8: 4}
EXCHANGES = ("all_to_all", "ring", "hierarchical")
TOLERANCE = 2e-5
"""Of the largest entry: fp32 against float64."""


@dataclass(frozen=True)
class Case:
    """One layer on all ranks."""

    per_rank: int = 2
    """Experts of a rank."""
    top_k: int | None = 2
    """None: every expert."""
    tokens: tuple[int, ...] = (9, 4, 13, 6)
    """By rank, over and over."""
    routing: str = "random"
    hidden: int = 16
    width: int = 8
    implementation: str = "grouped_mm"
    seed: int = 0

    def num_experts(self, size):
        return self.per_rank * size

    def weights(self, size):
        """gate_up [E, 2, F, D] and down [E, D, F]."""
        generator, experts = torch.Generator().manual_seed(self.seed), self.num_experts(size)
        shapes = (experts, 2, self.width, self.hidden), (experts, self.hidden, self.width)
        return [torch.randn(shape, generator=generator) / 4 for shape in shapes]

    def inputs(self, rank, size):
        """x_TD, weight_TK, expert_TK and the gradient of the output, of one rank."""
        generator = torch.Generator().manual_seed(100 + self.seed + rank)
        tokens, experts = self.tokens[rank % len(self.tokens)], self.num_experts(size)
        top_k = self.top_k or experts
        x_TD, grad_TD = (torch.randn(tokens, self.hidden, generator=generator) for _ in range(2))
        expert_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
        if self.routing == "one expert":
            expert_TK = torch.full((tokens, 1), experts - 1)
        elif self.routing == "first rank":  # the other ranks' experts are idle
            expert_TK = torch.rand(tokens, self.per_rank, generator=generator).argsort(1)[:, :top_k]
        drop_rate = {"some dropped": 0.4, "all dropped": 1.0}.get(self.routing, 0.0)
        expert_TK = expert_TK.masked_fill(torch.rand(expert_TK.shape, generator=generator) < drop_rate, -1)
        weight_TK = torch.rand(expert_TK.shape, generator=generator).masked_fill(expert_TK < 0, 0.0)
        return x_TD, weight_TK, expert_TK, grad_TD


CASES = {
    "plain": Case(),
    "one expert per rank, top-1": Case(per_rank=1, top_k=1),
    "one expert per rank, top-2": Case(per_rank=1),
    "every expert": Case(top_k=None),
    "three per rank, odd widths": Case(per_rank=3, top_k=3, hidden=13, width=7, implementation="loop"),
    "one expert for all": Case(top_k=1, routing="one expert"),
    "experts of the first rank only": Case(routing="first rank"),
    "some dropped": Case(per_rank=3, top_k=3, routing="some dropped"),
    "all dropped": Case(routing="all dropped"),
    "ranks without tokens": Case(tokens=(0, 5)),
    "one token": Case(tokens=(0, 1, 0, 0, 0, 0, 0, 0)),
    "no tokens": Case(tokens=(0,)),
    "large messages": Case(tokens=(700, 500), hidden=128, routing="some dropped"),
}


def oracle(case, size):
    """Float64: [y_TD, grad_x_TD, grad_weight_TK] of every rank, and the gradients of both weights of all experts."""
    gate_up_E2FD, down_EDF = (w.double().requires_grad_() for w in case.weights(size))
    ranks = []
    for rank in range(size):
        x_TD, weight_TK, expert_TK, grad_TD = case.inputs(rank, size)
        x_TD, weight_TK = x_TD.double().requires_grad_(), weight_TK.double().requires_grad_()
        gate_TEF, up_TEF = torch.einsum("td,epfd->ptef", x_TD, gate_up_E2FD)
        y_TED = torch.einsum("tef,edf->ted", F.silu(gate_TEF) * up_TEF, down_EDF)
        chosen_TKE = F.one_hot(expert_TK + 1, case.num_experts(size) + 1)[..., 1:].double()
        y_TD = torch.einsum("tk,tke,ted->td", weight_TK, chosen_TKE, y_TED)
        (y_TD * grad_TD.double()).sum().backward()
        ranks.append([y_TD.detach(), x_TD.grad, weight_TK.grad])
    return ranks, [gate_up_E2FD.grad, down_EDF.grad]


def build(case, groups, name, experts_type=Experts, **options):
    """This rank's dispatcher and experts."""
    rank, size = (groups.rank, groups.world_size) if groups else (0, 1)
    experts = experts_type(case.per_rank, case.hidden, case.width, case.implementation)
    with torch.no_grad():
        for parameter, weight in zip(experts.parameters(), case.weights(size)):
            parameter.copy_(weight[rank * case.per_rank : (rank + 1) * case.per_rank])
    moe = MoEConfig(num_experts=case.num_experts(size), dispatcher=name, **options)
    return build_dispatcher(moe, groups.experts if groups else None, moe.num_experts), experts


def apply(case, rank, size, dispatcher, experts, recompute=False, dtype=torch.float32):
    """[y_TD, grad_x_TD, grad_weight_TK, grad_gate_up, grad_down]"""
    x_TD, weight_TK, expert_TK, grad_TD = case.inputs(rank, size)
    x_TD, grad_TD = x_TD.to(dtype).requires_grad_(), grad_TD.to(dtype)
    weight_TK.requires_grad_()
    experts.zero_grad()
    if recompute:
        y_TD = checkpoint(lambda x, w: dispatcher(x, w, expert_TK, experts), x_TD, weight_TK, use_reentrant=False)
    else:
        y_TD = dispatcher(x_TD, weight_TK, expert_TK, experts)
    y_TD.backward(grad_TD)
    return [y_TD.detach(), x_TD.grad, weight_TK.grad, *(parameter.grad for parameter in experts.parameters())]


def bytes_to_peers(case, size, element, rank, ring, sources, experts, rounds=1, once=True):
    """Bytes that ``rank`` sends to each peer of ``ring`` in a forward and a backward pass, from the routing alone.

    ``sources[r]`` are the ranks whose tokens r passes on, ``experts[r]`` the experts that r is the way to. A row goes
    there and back in both passes; behind it travel a weight and a number for each assignment, and on the last way back
    the gradient of the weight. ``once``: a row that several experts of a peer want crosses once, not once for each.
    """

    def wanted(sender, receiver):
        choices = [case.inputs(source, size)[2] for source in sources[sender]]
        masks = [(expert_TK >= experts[receiver].start) & (expert_TK < experts[receiver].stop) for expert_TK in choices]
        assignments = sum(int(mask_TK.sum()) for mask_TK in masks)
        return sum(int(mask_TK.any(1).sum()) for mask_TK in masks) if once else assignments, assignments

    sent = {}
    for peer in set(ring) - {rank}:
        (rows, assignments), (guests, their_assignments) = wanted(rank, peer), wanted(peer, rank)
        beside_rows = 8 * assignments + 4 * their_assignments if once else 0
        counts = 8 * rounds * (len(experts[peer]) + once)
        sent[peer] = 2 * (rows + guests) * case.hidden * element + beside_rows + counts
    return sent


def payload(case, rank, size, name, element):
    """Bytes that a rank sends in all, and those that leave its node."""
    each, per_node = case.per_rank, RANKS_PER_NODE[size]
    held = {r: range(r * each, (r + 1) * each) for r in range(size)}
    itself = {r: [r] for r in range(size)}
    layer = functools.partial(bytes_to_peers, case, size, element, rank)
    if name != "hierarchical" or per_node == size:
        sent = layer(range(size), itself, held, once=name != "all_to_all")
    else:
        nodes = {r: range(r // per_node * per_node, (r // per_node + 1) * per_node) for r in range(size)}
        rails = {r: range(r % per_node, size, per_node) for r in range(size)}
        on_node = {r: range(node.start * each, node.stop * each) for r, node in nodes.items()}
        sent = layer(rails[rank], itself, on_node) | layer(nodes[rank], rails, held, rounds=size // per_node)
    far = sum(count for peer, count in sent.items() if peer // per_node != rank // per_node)
    return sum(sent.values()), far


def every_case(groups):
    results = {}
    for name in EXCHANGES:
        for key, case in CASES.items():
            dispatcher, experts = build(case, groups, name)
            result = apply(case, groups.rank, groups.world_size, dispatcher, experts)
            traffic = dispatcher.traffic
            assert 0 <= traffic.exposed_seconds <= traffic.seconds
            results[name, key] = result, (traffic.bytes_sent, traffic.bytes_between_nodes)
    return results


def parallel(size):
    return {"expert_model_parallel_size": size, "expert_ranks_per_node": RANKS_PER_NODE[size]}


@functools.cache
def results_of(size):
    return run_ranks(every_case, size, parallel=parallel(size))


expected_of = functools.cache(lambda key, size: oracle(CASES[key], size))


def close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def compare(case, size, ranks, expected, tolerance=TOLERANCE):
    """Results of all ranks against the oracle."""
    own, grads = expected
    for rank, result in enumerate(ranks):
        held = slice(rank * case.per_rank, (rank + 1) * case.per_rank)
        dropped_TK = case.inputs(rank, size)[2] < 0
        assert (result[2][dropped_TK] == 0).all()
        for actual, wanted in zip(result, (*own[rank], *(grad[held] for grad in grads))):
            close(actual, wanted, tolerance)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("size", RANKS_PER_NODE)
def test_dispatchers_equal_the_oracle(size, name, key):
    compare(CASES[key], size, [rank[name, key][0] for rank in results_of(size)], expected_of(key, size))


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("size", RANKS_PER_NODE)
def test_bytes_sent_follow_from_the_routing(size, name, key):
    for rank, results in enumerate(results_of(size)):
        assert results[name, key][1] == payload(CASES[key], rank, size, name, 4)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("name", [*EXCHANGES, "local"])
def test_without_groups_all_experts_are_here(name, key):
    case = CASES[key]
    if case.num_experts(1) < (case.top_k or 1):
        case = Case(per_rank=2)
    dispatcher, experts = build(case, None, name)
    compare(case, 1, [apply(case, 0, 1, dispatcher, experts)], oracle(case, 1))
    assert dispatcher.traffic.bytes_sent == 0


class UnevenExperts(Experts):
    """Takes a while, a different one in every pass and on every rank."""

    def pause(self):
        time.sleep(0.03 * torch.rand(()).item())

    def forward(self, x_ND, assignment):
        self.pause()
        return super().forward(x_ND, assignment)

    def backward(self, *arguments):
        self.pause()
        return super().backward(*arguments)


def slow_ranks(groups):
    case, rank, size = CASES["some dropped"], groups.rank, groups.world_size
    torch.manual_seed(rank)
    for name in ("ring", "hierarchical"):
        runs = []
        for experts_type in (Experts, UnevenExperts, UnevenExperts):
            dispatcher, experts = build(case, groups, name, experts_type)
            if rank == 1 and experts_type is UnevenExperts:
                time.sleep(0.3)
            runs.append([apply(case, rank, size, dispatcher, experts) for _ in range(3)][-1])
        for run in runs[1:]:
            assert all(map(torch.equal, run, runs[0]))


def test_results_are_the_same_bits_whichever_rank_is_slow():
    run_ranks(slow_ranks, 4, parallel=parallel(4))


def variations(groups):
    for name in EXCHANGES:
        vary(groups, name)


def vary(groups, name):
    """Recomputation, a frozen input, frozen experts, no gradients: against the plain run."""
    case, rank, size = CASES["some dropped"], groups.rank, groups.world_size
    dispatcher, experts = build(case, groups, name)
    plain = apply(case, rank, size, dispatcher, experts)
    assert all(map(torch.equal, apply(case, rank, size, dispatcher, experts, recompute=True), plain))

    x_TD, weight_TK, expert_TK, grad_TD = case.inputs(rank, size)
    experts.zero_grad()
    dispatcher(x_TD, weight_TK, expert_TK, experts).backward(grad_TD)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(experts.parameters(), plain[3:]))

    experts.requires_grad_(False).zero_grad()
    x_TD.requires_grad_()
    dispatcher(x_TD, weight_TK, expert_TK, experts).backward(grad_TD)
    assert torch.equal(x_TD.grad, plain[1]) and experts.gate_up.grad is None

    with torch.no_grad():
        y_TD = dispatcher(x_TD, weight_TK, expert_TK, experts)
    assert torch.equal(y_TD, plain[0]) and not y_TD.requires_grad
    dispatcher.traffic.reset()
    assert dispatcher.traffic.bytes_sent == dispatcher.traffic.seconds == 0


def test_recomputation_and_frozen_parts():
    run_ranks(variations, 4, parallel=parallel(4))


class WatchedExperts(Experts):
    """Knows what its backward passes left for the weight gradients."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left = []

    def backward(self, saved, grad_y_ND, pending, meanwhile=lambda: None):
        pieces = []
        result = super().backward(saved, grad_y_ND, pieces)
        self.left += [weakref.ref(tensor) for tensor in (pieces[0].activation_AF, pieces[0].grad_gate_up_AH)]
        pending.append(pieces.pop())
        meanwhile()
        return result


def twice(case, rank, size, dispatcher, experts, recompute, context=contextlib.nullcontext):
    """Gradients of inputs, of weights after two backward passes in ``context``, and what it gave."""
    grads, contexts = [], []
    experts.zero_grad()
    for _ in range(2):
        x_TD, weight_TK, expert_TK, grad_TD = case.inputs(rank, size)
        x_TD.requires_grad_(), weight_TK.requires_grad_()
        call = functools.partial(checkpoint, dispatcher, use_reentrant=False) if recompute else dispatcher
        y_TD = call(x_TD, weight_TK, expert_TK, experts)
        with context() as given:
            y_TD.backward(grad_TD)
        contexts.append(given)
        grads += [x_TD.grad, weight_TK.grad]
    return grads, contexts


def defer(groups, recompute):
    case = CASES["some dropped"]
    rank, size = (groups.rank, groups.world_size) if groups else (0, 1)
    for name in ("ring", "hierarchical"):
        dispatcher, experts = build(case, groups, name, WatchedExperts)
        plain, _ = twice(case, rank, size, dispatcher, experts, recompute)
        expected = [parameter.grad for parameter in experts.parameters()]
        assert not any(reference() is not None for reference in experts.left)

        experts.left.clear()
        grads, queues = twice(case, rank, size, dispatcher, experts, recompute, deferring)
        assert all(map(torch.equal, grads, plain))
        assert all(parameter.grad is None for parameter in experts.parameters())
        assert len(experts.left) > 0 and all(reference() is not None for reference in experts.left)
        for queue in queues:
            for add in queue:
                add()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(experts.parameters(), expected, strict=True))
        assert not any(reference() is not None for reference in experts.left), "freed, though the queue is still there"


@pytest.mark.parametrize("recompute", [False, True])
def test_weight_gradients_can_wait(recompute):
    """The same bits, later; all that they need is kept until then, and no longer."""
    defer(None, recompute)
    run_ranks(defer, 4, recompute, parallel=parallel(4))


def test_all_to_all_never_waits():
    run_ranks(defer_nothing, 2, parallel=parallel(2))


def defer_nothing(groups):
    case = CASES["plain"]
    dispatcher, experts = build(case, groups, "all_to_all")
    with deferring() as queue:
        apply(case, groups.rank, groups.world_size, dispatcher, experts)
    assert not queue and all(parameter.grad is not None for parameter in experts.parameters())


HALVES = {"wire": [torch.float32] * 5, "model": [*[torch.bfloat16] * 2, torch.float32, *[torch.bfloat16] * 2]}
"""What is bf16 -> types of the results."""


def in_half(groups):
    """Results and bytes sent of every dispatcher and both ways to use bf16."""
    case, results = CASES["plain"], {}
    for name in EXCHANGES:
        for half in HALVES:
            dispatcher, experts = build(case, groups, name, wire_dtype="bf16" if half == "wire" else "same")
            dtype = torch.float32 if half == "wire" else torch.bfloat16
            result = apply(case, groups.rank, groups.world_size, dispatcher, experts.to(dtype), dtype=dtype)
            results[name, half] = result, dispatcher.traffic.bytes_sent
    return results


@functools.cache
def results_in_half():
    return run_ranks(in_half, 4, parallel=parallel(4))


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("half", HALVES)
def test_bf16_is_near_and_half_as_long(half, name):
    case, results = CASES["plain"], [rank[name, half] for rank in results_in_half()]
    assert all([tensor.dtype for tensor in result] == HALVES[half] for result, _ in results)
    compare(case, 4, [result for result, _ in results], oracle(case, 4), 3e-2)
    for rank, (_, sent) in enumerate(results):
        assert sent == payload(case, rank, 4, name, 2)[0]
