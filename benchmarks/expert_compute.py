"""The experts of one rank on one core: rows as they are, against experts padded to the fullest one.

From tokens, gate weights and chosen experts to the weighted sum and back to all gradients, fp32, nothing dropped. All
sides have the same weights and routing, and their outputs and gradients are compared with ours before they are timed.
Every round has tokens of its own. Logits are skew * N(0, 1) of the expert + Gumbel noise of the token.

- ours: ``Experts`` with grouped products, through the ``local`` dispatcher.
- padded bmm: every expert gets as many rows as the fullest one, in batched matrix products.
- DeepSpeed Experts: ``deepspeed.moe``'s experts on the same padded rows, gathered and scattered by index.
- deepspeed.moe: the same experts between the products with one-hot masks by which its layer moves rows. Its gate, which
  makes the masks from yet more products, is replaced by the given routing.
- AutoEP: DeepSpeed's ``GroupedExperts``, which pads nothing either: grouped, grouped with one product for gate and up,
  and the loop. Its SwiGLU is a Triton kernel; on a CPU the plain form that it has too takes its place.

Not to pad saves the padding and no more: where the fullest expert has r times the mean, padding by index costs about r
times our products. So the goal for the two sides that pad by index holds from r = 2; ``deepspeed.moe`` has it always.

    python benchmarks/expert_compute.py --check
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, GroupedExperts
from deepspeed.moe.experts import Experts as DeepSpeedExperts
from deepspeed.moe.sharded_moe import einsum
from moe_peers import Shape, SwiGLU
from torch import Tensor, nn

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.dispatch import build_dispatcher
from megatron_ds.model.moe.experts import Experts

SHAPES = [
    Shape(tokens=1024, hidden=512, ffn=512, experts=8, top_k=2, skew=0.5),
    Shape(tokens=1024, hidden=512, ffn=512, experts=8, top_k=2, skew=1.0),
    Shape(tokens=1024, hidden=512, ffn=128, experts=64, top_k=8, skew=0.5),
]
GOAL = 2.0
"""How many times faster than padding ours must be."""
TOLERANCE = 1e-5
"""Largest difference of an output or gradient from ours, relative to its norm."""


@dataclass(frozen=True)
class Batch:
    """The tokens of one round."""

    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    grad_TD: Tensor
    """Gradient of the loss by the output."""


def main(argv: list[str]) -> int:
    options = harness.parser(__doc__, rounds=7).parse_args(argv)
    torch.set_num_threads(1)
    EXPERT_ACTIVATIONS["swiglu"] = dataclasses.replace(
        EXPERT_ACTIVATIONS["swiglu"], fused_fn=None, packed_fused_fn=None
    )
    report = harness.Report("Experts of one rank on one core, forward + backward, fp32, D=512, 1024 tokens")
    for shape in SHAPES:
        compare(report, shape, options.rounds)
    return report.finish(options)


def compare(report: harness.Report, shape: Shape, rounds: int) -> None:
    """Time all sides in turn, on other tokens in each round."""
    batches = [make_batch(shape, seed) for seed in range(rounds + 1)]
    sides = {name: build(shape) for name, build in SIDES.items()}
    check_equality(sides, batches[0])
    seconds = harness.paired_seconds({name: steps(side, batches) for name, side in sides.items()}, rounds)
    label = f"E={shape.experts} F={shape.ffn} top-{shape.top_k} skew {shape.skew:g}:"
    mean = shape.tokens * shape.top_k / shape.experts
    fullest = [int(batch.expert_TK.flatten().bincount().max()) / mean for batch in batches[1:]]
    report.add(f"{label} fullest expert / mean", "ratio", fullest)
    for name, samples in seconds.items():
        report.add(f"{label} {name}", "ms", [1000 * s for s in samples])
    for name in list(sides)[1:]:
        has_goal = name == "deepspeed.moe" or (name in PADDED and statistics.median(fullest) >= GOAL)
        goal = {"at_least": GOAL} if has_goal else {}
        report.add_ratio(f"{label} {name} / ours", seconds[name], seconds["ours"], **goal)


def make_batch(shape: Shape, seed: int) -> Batch:
    """Tokens, and softmax gates of the top k, renormalised."""
    generator = torch.Generator().manual_seed(seed)
    popularity_E = shape.skew * torch.randn(shape.experts, generator=generator)
    noise_TE = -torch.empty(shape.tokens, shape.experts).exponential_(generator=generator).log()
    weight_TK, expert_TK = (popularity_E + noise_TE).softmax(dim=1).topk(shape.top_k)
    x_TD, grad_TD = torch.randn(2, shape.tokens, shape.hidden, generator=generator)
    weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    return Batch(x_TD.requires_grad_(), weight_TK.requires_grad_(), expert_TK, grad_TD)


# --- sides ----------------------------------------------------------------------------------------------------------


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_TD, weight_TK, expert_TK) -> y_TD"""
Compute = Callable[[Tensor], Tensor]
"""x_ECD -> y_ECD, C rows for each expert: as many as the fullest one has."""


@dataclass(frozen=True)
class Side:
    """A layer that was built for one shape."""

    forward: Forward
    parameters: list[nn.Parameter]
    gradients: Callable[[], tuple[Tensor, Tensor]]
    """Those of the weights, laid out as gate_up [E, 2F, D] and down [E, D, F]."""


def make_weights(shape: Shape) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, D] and down [E, D, F], the same for all sides."""
    E, D, F_ = shape.experts, shape.hidden, shape.ffn
    generator = torch.Generator().manual_seed(0)
    gate_up_EHD = torch.randn(E, 2 * F_, D, generator=generator) / D**0.5
    return gate_up_EHD, torch.randn(E, D, F_, generator=generator) / F_**0.5


def ours(shape: Shape) -> Side:
    experts = Experts(shape.experts, shape.hidden, shape.ffn, "grouped_mm")
    gate_up_EHD, experts.down.data = make_weights(shape)
    experts.gate_up.data = gate_up_EHD.view_as(experts.gate_up)
    moe = MoEConfig(num_experts=shape.experts, moe_router_topk=shape.top_k)
    dispatcher = build_dispatcher(moe, None, shape.experts)
    return Side(
        lambda x_TD, weight_TK, expert_TK: dispatcher(x_TD, weight_TK, expert_TK, experts),
        list(experts.parameters()),
        lambda: (experts.gate_up.grad.flatten(1, 2), experts.down.grad),
    )


def padded_bmm(shape: Shape) -> Side:
    gate_up, down = map(nn.Parameter, make_weights(shape))

    def compute(x_ECD: Tensor) -> Tensor:
        gate_ECF, up_ECF = torch.bmm(x_ECD, gate_up.transpose(1, 2)).chunk(2, dim=2)
        return torch.bmm(F.silu(gate_ECF) * up_ECF, down.transpose(1, 2))

    return Side(padded(shape, compute), [gate_up, down], lambda: (gate_up.grad, down.grad))


def deepspeed_experts(shape: Shape, layer: Callable[[Shape, Compute], Forward]) -> Side:
    module = DeepSpeedExperts(SwiGLU(shape.hidden, shape.ffn), shape.experts)
    experts = list(module.deepspeed_experts)
    for expert, gate_up, down in zip(experts, *make_weights(shape)):
        expert.gate_up.weight.data, expert.down.weight.data = gate_up.clone(), down.clone()
    return Side(
        layer(shape, lambda x_ECD: module(x_ECD[None])[0]),
        list(module.parameters()),
        lambda: (
            torch.stack([expert.gate_up.weight.grad for expert in experts]),
            torch.stack([expert.down.weight.grad for expert in experts]),
        ),
    )


def auto_ep(shape: Shape, **options: object) -> Side:
    experts = GroupedExperts(shape.hidden, shape.ffn, shape.experts, **options)
    gate_up, down = make_weights(shape)
    for parameter, weight in zip((experts.w1, experts.w3, experts.w2), (*gate_up.chunk(2, dim=1), down)):
        parameter.data = weight.contiguous()

    def forward(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        order_A, row_A, count_E = sort_by_expert(shape, expert_TK)
        y_AD = experts(x_TD.index_select(0, row_A), count_E)
        return combine(x_TD, y_AD, weight_TK.flatten()[order_A], row_A)

    return Side(
        forward,
        list(experts.parameters()),
        lambda: (torch.cat([experts.w1.grad, experts.w3.grad], dim=1), experts.w2.grad),
    )


SIDES: dict[str, Callable[[Shape], Side]] = {
    "ours": ours,
    "padded bmm": padded_bmm,
    "DeepSpeed Experts": lambda shape: deepspeed_experts(shape, padded),
    "deepspeed.moe": lambda shape: deepspeed_experts(shape, masked),
    "AutoEP grouped": auto_ep,
    "AutoEP grouped, one gate_up": lambda shape: auto_ep(shape, gate_up_impl="fused"),
    "AutoEP loop": lambda shape: auto_ep(shape, use_grouped_mm=False),
}
PADDED = ("padded bmm", "DeepSpeed Experts")


# --- what the peers share -------------------------------------------------------------------------------------------


def padded(shape: Shape, compute: Compute) -> Forward:
    """A layer around ``compute`` that moves rows by index."""

    def forward(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        order_A, row_A, count_E = sort_by_expert(shape, expert_TK)
        slot_A, capacity = slots(count_E)
        x_SD = x_TD.new_zeros(shape.experts * capacity, shape.hidden)
        x_SD = x_SD.index_copy(0, slot_A, x_TD.index_select(0, row_A))
        y_SD = compute(x_SD.view(shape.experts, capacity, shape.hidden)).flatten(0, 1)
        return combine(x_TD, y_SD.index_select(0, slot_A), weight_TK.flatten()[order_A], row_A)

    return forward


def masked(shape: Shape, compute: Compute) -> Forward:
    """The same with ``deepspeed.moe``'s products of one-hot masks and its einsum."""

    def forward(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        order_A, row_A, count_E = sort_by_expert(shape, expert_TK)
        slot_A, capacity = slots(count_E)
        empty_TS = x_TD.new_zeros(shape.tokens, shape.experts * capacity)
        weight_TS = empty_TS.index_put((row_A, slot_A), weight_TK.flatten()[order_A])
        weight_TEC = weight_TS.view(shape.tokens, shape.experts, capacity)
        y_ECD = compute(einsum("sec,sm->ecm", weight_TEC.bool().type_as(x_TD), x_TD))
        return einsum("sec,ecm->sm", weight_TEC, y_ECD)

    return forward


def slots(count_E: Tensor) -> tuple[Tensor, int]:
    """Places of the assignments, sorted by expert, among E x C slots; C, the rows of the fullest expert."""
    capacity = int(count_E.max())
    free_E = torch.arange(len(count_E)) * capacity - (count_E.cumsum(0) - count_E)
    return torch.arange(int(count_E.sum())) + free_E.repeat_interleave(count_E), capacity


def sort_by_expert(shape: Shape, expert_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments by expert: their places in expert_TK, their tokens, and the number of each expert."""
    order_A = expert_TK.flatten().argsort(stable=True)
    return order_A, order_A // shape.top_k, expert_TK.flatten().bincount(minlength=shape.experts)


def combine(x_TD: Tensor, y_AD: Tensor, weight_A: Tensor, row_A: Tensor) -> Tensor:
    """Weighted sum of the outputs of each token."""
    return torch.zeros_like(x_TD).index_add(0, row_A, y_AD * weight_A[:, None])


# --- running --------------------------------------------------------------------------------------------------------


def run(side: Side, batch: Batch) -> Tensor:
    """Forward and backward, gradients in ``.grad``; returns the output."""
    for tensor in (batch.x_TD, batch.weight_TK, *side.parameters):
        tensor.grad = None
    y_TD = side.forward(batch.x_TD, batch.weight_TK, batch.expert_TK)
    y_TD.backward(batch.grad_TD)
    return y_TD.detach()


def steps(side: Side, batches: Iterable[Batch]) -> Callable[[], Tensor]:
    """A step on the next batch at every call."""
    following = iter(batches)
    return lambda: run(side, next(following))


def check_equality(sides: dict[str, Side], batch: Batch) -> None:
    """Output and all gradients of every side equal ours."""
    results = {}
    for name, side in sides.items():
        y_TD = run(side, batch)
        results[name] = (y_TD, batch.x_TD.grad, batch.weight_TK.grad, *side.gradients())
    for name, result in results.items():
        for label, value, want in zip(("output", "x", "weight", "gate_up", "down"), result, results["ours"]):
            difference = float((value - want).norm() / want.norm())
            assert difference < TOLERANCE, f"{name}: {label} differs from ours by {difference:.1e} of its norm"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
