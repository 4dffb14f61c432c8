"""How many of the rows that experts compute are of use, how many assignments that costs, and what balances the load.

Four ranks with 1024 tokens each, simulated in one process, as nothing here depends on time. Logits are Gumbel noise
plus ``skew`` x a normal number for each expert (its popularity); a round draws both anew. Three parts:

- Rows of use: useful rows / computed rows. Ours is counted at the grouped product that our experts run. DeepSpeed's is
  what its own gating functions say of the same logits, rank by rank: every rank's tokens take E x capacity rows, and
  without dropping the capacity is the largest of all ranks (its all-reduce).
- Capacity: both kinds have the same total of slots. Lambda comes from the steps before, never from the tokens that it
  limits. Without skew equal shares are the best there is, and the noise of lambda can only lose a little.
- Bias: fresh tokens in every step, the configuration's default rate.

    python benchmarks/expert_utilisation.py --check
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import harness
import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import top2gating, topkgating
from torch import Tensor

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.balance import Balance, update_bias
from megatron_ds.model.moe.dispatch import build_dispatcher
from megatron_ds.model.moe.experts import Experts
from megatron_ds.model.moe.router import Router, Routing

RANKS, TOKENS = 4, 1024
LAYERS = ((8, 2), (64, 8))
"""(experts, top-k)"""
SKEWS = (0.0, 0.2, 0.5, 1.0)
CAPACITY_FACTOR = 1.25
WARM_UP_STEPS, MEASURED_STEPS = 30, 10
"""Of the capacity part: steps that only measure lambda, then steps that count what is kept."""
BIAS_SKEW, BIAS_STEPS, LAST_STEPS = 0.5, 200, 20
"""Of the bias part: its skew, all steps, and those at the end that the goal is about."""


@dataclass(frozen=True)
class Usage:
    """Rows of one global batch."""

    assigned: int
    """What the router chose: tokens x top-k."""
    useful: int
    """Assignments that an expert computed."""
    computed: int
    """Rows that the experts computed, with padding."""

    @property
    def utilisation(self) -> float:
        return self.useful / self.computed

    @property
    def dropped_percent(self) -> float:
        return 100 * (1 - self.useful / self.assigned)


def main(argv: list[str]) -> int:
    options = harness.parser(__doc__, rounds=9).parse_args(argv)
    torch.set_num_threads(1)
    sizes = " and ".join(f"E={experts} top-{topk}" for experts, topk in LAYERS)
    report = harness.Report(f"Use of the experts: {RANKS} x {TOKENS} tokens, {sizes}, {options.rounds} draws each")
    for experts, topk in LAYERS:
        for skew in SKEWS:
            compare_utilisation(report, experts, topk, skew, options.rounds)
        for skew in SKEWS:
            compare_capacity(report, experts, topk, skew, options.rounds)
        balance_by_bias(report, experts, topk, options.rounds)
    return report.finish(options)


def batches(experts: int, skew: float, draw: int) -> Iterator[Tensor]:
    """Without end: logit_RTE of a step's tokens on all ranks; the popularity of the experts stays."""
    generator = torch.Generator().manual_seed(draw)
    popularity_E = skew * torch.randn(experts, generator=generator)
    while True:
        gumbel_RTE = -torch.empty(RANKS, TOKENS, experts).exponential_(generator=generator).log()
        yield popularity_E + gumbel_RTE


def make_router(moe: MoEConfig) -> Router:
    """A router whose input is the logits."""
    router = Router(moe.num_experts, moe)
    torch.nn.init.eye_(router.weight)
    return router.requires_grad_(False)


# --- utilisation ----------------------------------------------------------------------------------------------------


def compare_utilisation(report: harness.Report, experts: int, topk: int, skew: float, rounds: int) -> None:
    samples: dict[str, list[Usage]] = {side: [] for side in SIDES}
    for draw in range(rounds):
        logit_RTE = next(batches(experts, skew, draw))
        for side, measure in SIDES.items():
            samples[side].append(measure(logit_RTE, topk))
    label = f"E={experts} skew {skew:g} rows of use"
    for side, usages in samples.items():
        unit = drops([usage.dropped_percent for usage in usages])
        report.add(f"{label}, {side}", unit, [usage.utilisation for usage in usages])
    ours, padded = samples["ours"], samples["deepspeed padded"]
    assert all(usage.dropped_percent <= 0.5 for usage in ours + padded), "the ratio is between sides that drop nothing"
    gain = [a.utilisation / b.utilisation for a, b in zip(ours, padded)]
    report.add(f"{label}, ours / padded", "ratio", gain, **({"at_least": 1.37} if skew >= 0.2 else {}))


def drops(percents: list[float]) -> str:
    """In place of a unit: the share of the assignments that was dropped (median)."""
    return f"{statistics.median(percents):.2f} % drops"


def ours(logit_RTE: Tensor, topk: int) -> Usage:
    """Our layer on the tokens of all ranks: router, dispatcher, experts, with the rows of its product counted."""
    experts = logit_RTE.shape[2]
    moe = MoEConfig(num_experts=experts, moe_router_topk=topk, router={"kind": "softmax", "fine": "none"})
    x_TD = logit_RTE.flatten(0, 1)
    routing = make_router(moe)(x_TD)
    weight_TK, expert_TK = Balance(moe).limit(routing, 1)
    stack = Experts(experts, experts, experts)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad(), mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as product:
        build_dispatcher(moe, None, experts)(x_TD, weight_TK, expert_TK, stack)
    rows = max(len(call.args[0]) for call in product.call_args_list)
    return Usage(routing.expert_TK.numel(), int((expert_TK >= 0).sum()), rows)


def deepspeed(logit_RTE: Tensor, topk: int, drop_tokens: bool) -> Usage:
    """DeepSpeed's gating, as its ``TopKGate`` calls it; no sampling of the second expert, no least capacity."""
    experts, capacities, useful = logit_RTE.shape[2], [], 0
    for logit_TE in logit_RTE:
        options = dict(min_capacity=0, drop_tokens=drop_tokens, sparse_routes=True)
        if topk == 2:
            gate = top2gating(logit_TE, CAPACITY_FACTOR, top2_2nd_expert_sampling=False, **options)
        else:
            gate = topkgating(logit_TE, topk, CAPACITY_FACTOR, **options)
        _, capacity, _, expert_KT, *_ = gate
        capacities.append(int(capacity))
        useful += int((expert_KT >= 0).sum())
    return Usage(RANKS * TOKENS * topk, useful, RANKS * experts * max(capacities))


SIDES: dict[str, Callable[[Tensor, int], Usage]] = {
    "ours": ours,
    "deepspeed padded": lambda logit_RTE, topk: deepspeed(logit_RTE, topk, drop_tokens=False),
    "deepspeed cf 1.25": lambda logit_RTE, topk: deepspeed(logit_RTE, topk, drop_tokens=True),
}


# --- capacity -------------------------------------------------------------------------------------------------------


def compare_capacity(report: harness.Report, experts: int, topk: int, skew: float, rounds: int) -> None:
    kept = [kept_assignments(experts, topk, skew, draw) for draw in range(rounds)]
    assigned = MEASURED_STEPS * RANKS * TOKENS * topk
    label = f"E={experts} skew {skew:g} kept"
    for kind in ("fixed", "dynamic"):
        shares = [draw[kind] / assigned for draw in kept]
        report.add(f"{label}, {kind} capacity", drops([100 * (1 - share) for share in shares]), shares)
    more = [(draw["dynamic"] - draw["fixed"]) / MEASURED_STEPS for draw in kept]
    report.add(f"{label}, dynamic - fixed", f"of {RANKS * TOKENS * topk:,}", more, at_least=1 / MEASURED_STEPS)


def kept_assignments(experts: int, topk: int, skew: float, draw: int) -> dict[str, int]:
    """Assignments that each kind of capacity keeps, over the measured steps."""
    balances = {}
    for kind in ("fixed", "dynamic"):
        capacity = {"kind": kind, "factor": CAPACITY_FACTOR}
        moe = MoEConfig(
            num_experts=experts, moe_router_topk=topk, router={"kind": "softmax", "fine": "none"}, capacity=capacity
        )
        balances[kind] = Balance(moe)
    router = make_router(moe)
    kept = dict.fromkeys(balances, 0)
    for step, logit_RTE in zip(range(WARM_UP_STEPS + MEASURED_STEPS), batches(experts, skew, draw)):
        routings = [router(logit_TE) for logit_TE in logit_RTE]
        if step >= WARM_UP_STEPS:
            assert len({int(balance.slots(TOKENS).sum()) for balance in balances.values()}) == 1
            for kind, balance in balances.items():
                kept[kind] += sum(int((balance.limit(routing, 1)[1] >= 0).sum()) for routing in routings)
        for balance in balances.values():
            balance.update(load_of(routings, experts))
    return kept


def load_of(routings: list[Routing], experts: int) -> Tensor:
    """Assignments of every expert over all ranks."""
    return torch.cat([routing.expert_TK.flatten() for routing in routings]).bincount(minlength=experts)


# --- bias -----------------------------------------------------------------------------------------------------------


def balance_by_bias(report: harness.Report, experts: int, topk: int, rounds: int) -> None:
    first, last, settled = [], [], []
    for draw in range(rounds):
        imbalance = rank_imbalance(experts, topk, draw)
        first.append(imbalance[0])
        last.append(max(imbalance[-LAST_STEPS:]))
        above = [step for step, value in enumerate(imbalance) if value > 1.10]
        settled.append(above[-1] + 1 if above else 0)
    label, unit = f"E={experts} skew {BIAS_SKEW:g} rank max/mean", drops([0.0])
    report.add(f"{label}, first step", unit, first)
    report.add(f"{label}, worst of the last {LAST_STEPS}", unit, last, at_most=1.10)
    report.add(f"{label}, <= 1.10 from step", "step", settled)


def rank_imbalance(experts: int, topk: int, draw: int) -> list[float]:
    """Rows of the busiest rank / mean, step by step, while the bias is updated."""
    moe = MoEConfig(num_experts=experts, moe_router_topk=topk)
    router, balance, imbalance = make_router(moe), Balance(moe), []
    for _, logit_RTE in zip(range(BIAS_STEPS), batches(experts, BIAS_SKEW, draw)):
        load_E = load_of([router(logit_RTE.flatten(0, 1))], experts)
        load_R = load_E.view(RANKS, -1).sum(dim=1).double()
        imbalance.append(float(load_R.max() / load_R.mean()))
        balance.update(load_E)
        update_bias(router.bias, balance.load_factor, moe.moe_router_bias_update_rate)
    return imbalance


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
