"""Losses, capacity, counts and bias against explicit loops over tokens and experts."""

import itertools
import math

import pytest
import torch

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.balance import Balance, apportion, attach_loss, update_bias
from megatron_ds.model.moe.router import Router, Routing

EXPERTS, TOPK, WIDTH, BATCH, LENGTH = 7, 3, 11, 3, 5
TOKENS = BATCH * LENGTH


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moe(**options):
    return MoEConfig(**{"num_experts": EXPERTS, "moe_router_topk": TOPK} | options)


def route(tokens=TOKENS, kind="softmax", experts=EXPERTS, topk=TOPK, seed=0):
    """(routing, router) of random tokens; some experts are liked better than others."""
    config = moe(num_experts=experts, moe_router_topk=topk, router={"kind": kind, "fine": "none"})
    router = Router(WIDTH, config)
    router.weight.data = draw(experts, WIDTH, seed=seed + 1)
    x = draw(tokens, WIDTH, seed=seed + 2)
    return router(x + router.weight[0].detach()), router


# --- losses ---------------------------------------------------------------------------------------------------------


def switch(routing):
    """E / (K T) sum over e of count_e * mean probability_e."""
    tokens = len(routing.expert_TK)
    total = 0.0
    for e in range(EXPERTS):
        count = sum(e in row for row in routing.expert_TK.tolist())
        mean = sum(routing.probability_TE[t, e] for t in range(tokens)) / tokens
        total = total + EXPERTS / (TOPK * tokens) * count * mean
    return total


def sequence(routing):
    parts = [slice(b * LENGTH, (b + 1) * LENGTH) for b in range(BATCH)]
    fields = ("weight_TK", "expert_TK", "probability_TE", "logit_TE")
    return sum(switch(Routing(*(getattr(routing, f)[part] for f in fields))) for part in parts) / BATCH


def against_the_load(routing):
    return sum(LOAD_FACTOR[e] * routing.probability_TE[:, e].mean() for e in range(EXPERTS))


def z(routing):
    return sum(routing.logit_TE[t].exp().sum().log() ** 2 for t in range(TOKENS)) / TOKENS


LOAD_FACTOR = [2.0, 0.0, 0.5, 1.0, 1.5, 0.25, 1.75]
LOSSES = {
    "moe_aux_loss_coeff": switch,
    "moe_seq_aux_loss_coeff": sequence,
    "moe_global_aux_loss_coeff": against_the_load,
    "moe_z_loss_coeff": z,
}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("names", [[name] for name in LOSSES] + [[*LOSSES]], ids=[*LOSSES, "all"])
def test_losses_and_their_gradients(kind, names):
    coefficients = {name: 0.1 * (n + 1) for n, name in enumerate(names)}
    balance = Balance(moe(**coefficients))
    balance.load_factor.copy_(torch.tensor(LOAD_FACTOR))
    routing, router = route(kind=kind)
    loss = balance.auxiliary_loss(routing, BATCH)
    expected = sum(coefficient * LOSSES[name](routing) for name, coefficient in coefficients.items())
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(value, router.weight, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want)
    assert got.abs().max() > 1e-4


def test_no_loss():
    assert Balance(moe()).auxiliary_loss(route()[0], BATCH) is None


def test_a_balanced_layer_costs_its_coefficient():
    expert_TK = torch.arange(EXPERTS * TOPK).view(EXPERTS, TOPK) % EXPERTS  # 7 tokens, every expert 3 times
    probability_TE = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    even = Routing(torch.ones_like(expert_TK), expert_TK, probability_TE, torch.zeros_like(probability_TE))
    torch.testing.assert_close(Balance(moe(moe_aux_loss_coeff=0.3)).auxiliary_loss(even, 1), torch.tensor(0.3))


def test_the_first_global_loss_has_no_gradient():
    routing, router = route()
    loss = Balance(moe(moe_global_aux_loss_coeff=1.0)).auxiliary_loss(routing, BATCH)
    torch.testing.assert_close(loss, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, router.weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_loss_adds_its_scaled_gradient(dtype):
    x, w = draw(4, 6).to(dtype).requires_grad_(), draw(6, seed=1).requires_grad_()
    y, loss = x * 2, (w**2).sum()
    attached = attach_loss(y, loss, 0.25)
    assert torch.equal(attached, y) and attached.dtype == dtype
    attached.float().sum().backward()
    torch.testing.assert_close(w.grad, 0.25 * 2 * w.detach())
    assert torch.equal(x.grad, torch.full_like(x, 2))


# --- capacity -------------------------------------------------------------------------------------------------------


def limited(kind, factor=1.0, policy="probs", **options):
    capacity = {"kind": kind, "factor": factor, "drop_policy": policy, **options}
    return Balance(moe(capacity=capacity))


def keep_by_hand(routing, slots, policy):
    """Expert by expert, its list of tokens in order of priority."""
    weight_TK, expert_TK = routing.weight_TK.detach().clone(), routing.expert_TK.clone()
    for e in range(EXPERTS):
        places = (expert_TK == e).nonzero().tolist()
        if policy == "probs":
            places.sort(key=lambda place: -weight_TK[tuple(place)].item())
        for place in places[slots[e] :]:
            weight_TK[tuple(place)], expert_TK[tuple(place)] = 0.0, -1
    return weight_TK, expert_TK


def test_dropless_changes_nothing():
    routing, _ = route()
    weight_TK, expert_TK = Balance(moe()).limit(routing, 1)
    assert weight_TK is routing.weight_TK and expert_TK is routing.expert_TK


@pytest.mark.parametrize("kind, policy", [*itertools.product(["fixed", "dynamic"], ["probs", "position"])])
@pytest.mark.parametrize("factor", [0.1, 0.6, 1.25, 9.0])
def test_drops_what_the_policy_says(kind, policy, factor):
    balance = limited(kind, factor, policy)
    if kind == "dynamic":
        balance.share.copy_(draw(EXPERTS, seed=3).abs())
    routing, router = route()
    weight_TK, expert_TK = balance.limit(routing, 1)
    expected_weight_TK, expected_expert_TK = keep_by_hand(routing, balance.slots(TOKENS).tolist(), policy)
    assert torch.equal(expert_TK, expected_expert_TK) and torch.equal(weight_TK, expected_weight_TK)
    (got,) = torch.autograd.grad(weight_TK.square().sum(), router.weight, retain_graph=True)
    kept = routing.weight_TK * (expert_TK >= 0)
    torch.testing.assert_close(got, torch.autograd.grad(kept.square().sum(), router.weight)[0])


def test_of_equal_weights_the_first_tokens_stay():
    balance = limited("fixed", 0.5)
    expert_TK = torch.tensor([[0, 1, 2]] * 14)
    routing = Routing(torch.full((14, 3), 1 / 3), expert_TK, torch.empty(0), torch.empty(0))
    _, kept_TK = balance.limit(routing, 1)
    assert balance.slots(14).tolist() == [3] * EXPERTS
    assert kept_TK.tolist() == [[0, 1, 2]] * 3 + [[-1, -1, -1]] * 11


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_no_tokens(kind):
    weight_TK, expert_TK = limited(kind).limit(route(tokens=0)[0], 1)
    assert weight_TK.shape == expert_TK.shape == (0, TOPK)


@pytest.mark.parametrize("tokens", [0, 1, 13, 1024])
@pytest.mark.parametrize("seed", range(8))
def test_dynamic_slots_sum_to_the_fixed_total(tokens, seed):
    fixed, dynamic = limited("fixed", 1.1), limited("dynamic", 1.1, min_share=0.5, max_share=1.5)
    dynamic.share.copy_(3 * draw(EXPERTS, seed=seed).abs())
    slots_E = dynamic.slots(tokens)
    total = EXPERTS * math.ceil(1.1 * tokens * TOPK / EXPERTS)
    assert slots_E.dtype == torch.int64 and slots_E.min() >= 0
    assert int(slots_E.sum()) == int(fixed.slots(tokens).sum()) == total
    clamped = dynamic.share.double().clamp(0.5, 1.5)
    assert (slots_E - clamped * total / clamped.sum()).abs().max() < 1


def test_dynamic_slots_are_even_before_the_first_step():
    assert limited("dynamic").slots(100).tolist() == limited("fixed").slots(100).tolist()


@pytest.mark.parametrize("total, shares, expected", [
    (10, [1, 1, 1], [4, 3, 3]),  # equal remainders: the lower index
    (7, [5, 3, 2], [4, 2, 1]),  # quotas 3.5, 2.1, 1.4
    (3, [0.1] * 10, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    (0, [1, 2], [0, 0]),
])  # fmt: skip
def test_apportion(total, shares, expected):
    assert apportion(total, torch.tensor(shares).double()).tolist() == expected


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("seed", range(6))
def test_capacity_that_follows_the_load_keeps_all_that_fits(factor, seed):
    routing, _ = route(tokens=400, seed=10 * seed)
    fixed, dynamic = limited("fixed", factor), limited("dynamic", factor, min_share=1e-6, max_share=EXPERTS)
    load_E = routing.expert_TK.flatten().bincount(minlength=EXPERTS)
    dynamic.share.copy_(load_E / load_E.double().mean())
    kept = {b: int((b.limit(routing, 1)[1] >= 0).sum()) for b in (fixed, dynamic)}
    assert kept[dynamic] >= min(400 * TOPK, int(dynamic.slots(400).sum())) - 1  # one where a whole quota was rounded
    assert kept[dynamic] > kept[fixed]


# --- the load -------------------------------------------------------------------------------------------------------


def test_counts_of_a_step():
    balance = limited("fixed", 0.5)
    expected = torch.zeros(2, EXPERTS, dtype=torch.int64)
    for micro_batch in range(3):
        routing, _ = route(tokens=20 + micro_batch, seed=micro_batch)
        _, kept_TK = balance.limit(routing, 1)
        for chosen_row, kept_row in zip(routing.expert_TK.tolist(), kept_TK.tolist()):
            for chosen, kept in zip(chosen_row, kept_row):
                expected[0, chosen] += 1
                expected[1, chosen] += kept < 0
        for _ in range(micro_batch + 1):  # recomputed passes count once
            balance.record(micro_batch, routing.expert_TK, kept_TK)
    counts = balance.take_counts()
    assert torch.equal(counts, expected) and counts.dtype == torch.int64
    assert int(counts[0].sum()) == (20 + 21 + 22) * TOPK and counts[1].sum() > 0
    assert torch.equal(balance.take_counts(), torch.zeros_like(expected))


def test_load_factors_sum_to_the_number_of_experts():
    balance = Balance(moe())
    assert balance.load_factor.tolist() == [1.0] * EXPERTS
    load_E = torch.tensor([5, 0, 3, 1, 9, 2, 1])
    for dtype in (torch.int64, torch.float64):
        balance.update(load_E.to(dtype))
        torch.testing.assert_close(balance.load_factor, load_E / 3)
        torch.testing.assert_close(balance.load_factor.sum(), torch.tensor(float(EXPERTS)))
    balance.update(torch.zeros(EXPERTS))
    assert balance.load_factor.tolist() == [1.0] * EXPERTS


def test_share_is_a_running_mean():
    balance = limited("dynamic", smoothing=0.75)
    share = [1.0] * EXPERTS
    for step in range(4):
        load = [(e * (step + 2)) % 5 + 1 for e in range(EXPERTS)]
        balance.update(torch.tensor(load))
        share = [0.75 * s + 0.25 * n * EXPERTS / sum(load) for s, n in zip(share, load)]
    torch.testing.assert_close(balance.share, torch.tensor(share))
    assert not hasattr(limited("fixed"), "share") and not hasattr(Balance(moe()), "share")


def test_bias_moves_against_the_load():
    balance, bias_E = Balance(moe()), torch.zeros(EXPERTS)
    balance.update(torch.tensor([5, 0, 3, 1, 9, 2, 1]))
    update_bias(bias_E, balance.load_factor, 0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.0, 0.5, -0.5, 0.5, 0.5]
    update_bias(bias_E, balance.load_factor, 0.25)
    assert bias_E.tolist() == [-0.75, 0.75, 0.0, 0.75, -0.75, 0.75, 0.75]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_bias_updates_balance_a_skewed_router(kind):
    router = Router(WIDTH, moe(router={"kind": kind}))
    router.weight.data = 0.5 * draw(EXPERTS, WIDTH, seed=1)
    balance, x = Balance(moe()), draw(500, WIDTH) + router.weight.detach()[0]
    spread = []
    for _ in range(300):
        balance.update(router(x).expert_TK.flatten().bincount(minlength=EXPERTS))
        spread.append(balance.load_factor.max().item())
        update_bias(router.bias, balance.load_factor, 2e-3)
    assert spread[0] > 1.5 and max(spread[-5:]) < 1.1


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_a_cast_leaves_the_buffers_alone(cast):
    balance = limited("dynamic")
    balance.update(torch.tensor([5, 0, 3, 1, 9, 2, 1]))
    before = {name: buffer.clone() for name, buffer in balance.named_buffers()}
    after = dict(cast(torch.nn.Sequential(balance))[0].named_buffers())
    assert after.keys() == {"load_factor", "share"}
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


def test_losses_for_the_log_are_the_mean_over_micro_batches_and_taken_once():
    balance = Balance(MoEConfig())
    for micro_batch, value in ((0, 1.0), (1, 4.0), (0, 2.0)):  # micro-batch 0 ran again
        balance.record_loss(micro_batch, torch.tensor(value))
    assert balance.take_loss() == 3.0
    assert balance.take_loss() == 0.0
