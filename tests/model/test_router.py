"""The router against a plain reference that takes one token at a time, and against the routers of transformers."""

import copy
import itertools

import pytest
import torch

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.router import Router, best, jitter
from megatron_ds.parallel.tensor import ALONE, TensorRanks

EXPERTS, WIDTH = 12, 10


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(kind, fine="bias", topk=3, width=WIDTH, **options):
    moe = {"num_experts": EXPERTS, "moe_router_topk": topk}
    router = Router(width, MoEConfig(**moe, router={"kind": kind, "fine": fine, **options}))
    router.weight.data = draw(EXPERTS, width, seed=1)
    if router.refine is not None:
        router.refine.data = draw(EXPERTS, width, seed=2)
    if router.bias is not None:
        router.bias.copy_(0.3 * draw(EXPERTS, seed=3))
    return router


def route_one(router, x, weight, refine):
    """(experts, their weights) of one token, differentiable: the definition, expert by expert."""
    c, topk = router.config, router.topk
    softmax = c.kind == "softmax"
    bias = [0.0] * EXPERTS if router.bias is None else router.bias.tolist()
    logit = [weight[e] @ x for e in range(EXPERTS)]

    def scores(some):
        total = sum(logit[e].exp() for e in some)
        return {e: logit[e].exp() / total if softmax else 1 / (1 + (-logit[e]).exp()) for e in some}

    def leading(score, count):
        return sorted(score, key=lambda e: -(score[e].item() + bias[e]))[:count]

    score, candidates = scores(range(EXPERTS)), list(range(EXPERTS))
    if c.num_groups:
        size = EXPERTS // c.num_groups
        groups = [candidates[g * size : (g + 1) * size] for g in range(c.num_groups)]
        value = [
            sum(sorted((score[e].item() + bias[e] for e in g), reverse=True)[: 1 if softmax else 2]) for g in groups
        ]
        kept = sorted(range(c.num_groups), key=lambda g: -value[g])[: c.group_topk]
        candidates = [e for g in kept for e in groups[g]]
    if c.fine == "refine":
        candidates = leading({e: score[e] for e in candidates}, c.refine_candidates or 2 * topk)
        logit = [logit[e] + refine[e] @ x for e in range(EXPERTS)]
        score = scores(candidates)
    chosen = leading({e: score[e] for e in candidates}, topk)
    weights = torch.stack([score[e] for e in chosen])
    return chosen, (weights / weights.sum() if c.norm_topk_prob else weights) * c.scaling_factor


def check(router, tokens=7):
    """Experts, weights and all gradients of the weights."""
    x = draw(tokens, WIDTH, seed=4)
    ours, exact = [x.clone().requires_grad_()], [x.double().requires_grad_()]
    parameters = dict(router.named_parameters())
    doubles = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    routing = router(*ours)
    expected = [route_one(router, row, doubles["weight"], doubles.get("refine")) for row in exact[0]]
    assert routing.expert_TK.tolist() == [chosen for chosen, _ in expected]
    want = torch.stack([weights for _, weights in expected])
    torch.testing.assert_close(routing.weight_TK.double(), want, rtol=1e-5, atol=1e-6)
    scale = draw(*want.shape, seed=5)
    got = torch.autograd.grad((routing.weight_TK * scale).sum(), ours + list(parameters.values()))
    wanted = torch.autograd.grad((want * scale).sum(), exact + list(doubles.values()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


KINDS, FINE = ("softmax", "sigmoid"), ("none", "bias", "refine")
GROUPS = ({}, {"num_groups": 4, "group_topk": 3})
WEIGHTS = ({"norm_topk_prob": True}, {"norm_topk_prob": False, "scaling_factor": 2.5})


@pytest.mark.parametrize("kind, fine, groups, weights", [*itertools.product(KINDS, FINE, GROUPS, WEIGHTS)])
def test_equals_the_definition(kind, fine, groups, weights):
    check(build(kind, fine, **groups, **weights))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", range(1, EXPERTS + 1))
def test_any_topk(kind, topk):
    check(build(kind, topk=topk, norm_topk_prob=topk > 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [2, 5, EXPERTS])
def test_any_number_of_refined_candidates(kind, candidates):
    check(build(kind, "refine", topk=2, refine_candidates=candidates))


def test_refining_by_zero_over_all_experts_changes_nothing():
    plain = build("softmax")
    refined = build("softmax", "refine", refine_candidates=EXPERTS)
    refined.refine.data.zero_()
    x = draw(50, WIDTH)
    assert torch.equal(plain(x).expert_TK, refined(x).expert_TK)
    torch.testing.assert_close(plain(x).weight_TK, refined(x).weight_TK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fine", FINE)
def test_probabilities_are_the_scores_over_their_sum(kind, fine):
    router, x = build(kind, fine), draw(9, WIDTH)
    routing = router(x)
    score = routing.logit_TE.softmax(-1) if kind == "softmax" else routing.logit_TE.sigmoid()
    torch.testing.assert_close(routing.logit_TE, x @ router.weight.T)
    torch.testing.assert_close(routing.probability_TE, score / score.sum(-1, keepdim=True))
    assert routing.probability_TE.requires_grad and routing.logit_TE.requires_grad


def test_equals_ernie():
    from transformers import Ernie4_5_MoeConfig
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

    router, x = build("softmax"), draw(64, WIDTH)
    theirs = Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=WIDTH, moe_num_experts=EXPERTS, moe_k=3))
    theirs.weight.data = router.weight.data
    theirs.moe_statics.e_score_correction_bias.data = router.bias[None]
    _, weight, expert = theirs(x)
    ours = router(x)
    assert torch.equal(ours.expert_TK, expert)
    torch.testing.assert_close(ours.weight_TK, weight, rtol=0, atol=0)


def test_equals_deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    groups = {"num_groups": 4, "group_topk": 2}
    router, x = build("sigmoid", **groups, scaling_factor=2.5), draw(64, WIDTH)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=4, topk_group=2,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    theirs.weight.data = router.weight.data
    theirs.e_score_correction_bias.copy_(router.bias)
    _, weight, expert = theirs(x)
    ours = router(x)
    order = ours.expert_TK.argsort(dim=1)
    their_order = expert.argsort(dim=1)
    assert torch.equal(ours.expert_TK.gather(1, order), expert.gather(1, their_order))
    torch.testing.assert_close(ours.weight_TK.gather(1, order), weight.gather(1, their_order))


def test_scores_are_fp32_whatever_comes_in():
    router = build("softmax", "refine").bfloat16()
    x = draw(40, WIDTH).bfloat16()
    routing, exact = router(x), copy.deepcopy(router).float()(x.float())
    for name in ("weight_TK", "probability_TE", "logit_TE"):
        assert getattr(routing, name).dtype == torch.float32
        assert torch.equal(getattr(routing, name), getattr(exact, name))
    assert routing.expert_TK.dtype == torch.int64
    routing.weight_TK.square().sum().backward()
    assert router.weight.grad.dtype == router.refine.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)]
)
def test_a_cast_leaves_the_bias_alone(cast):
    router = build("sigmoid")
    bias = router.bias.clone()
    inside = cast(torch.nn.Sequential(router))[0]
    assert inside.weight.dtype != torch.float32
    assert inside.bias.dtype == torch.float32 and torch.equal(inside.bias, bias)
    assert "bias" in inside.state_dict() and not any(name == "bias" for name, _ in inside.named_parameters())


def test_moves_to_another_device():
    assert build("sigmoid").to("meta", torch.bfloat16).bias.is_meta
    with torch.device("meta"):
        router = Router(WIDTH, MoEConfig())
    router.to_empty(device="cpu")
    assert router.bias.device.type == "cpu" and router.bias.dtype == torch.float32


@pytest.mark.parametrize("fine", FINE)
def test_has_what_its_fine_stage_needs(fine):
    router = build("softmax", fine)
    names = {"none": {"weight"}, "bias": {"weight", "bias"}, "refine": {"weight", "bias", "refine"}}
    assert set(router.state_dict()) == names[fine]


def test_of_equal_scores_the_lower_index_wins():
    assert best(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4).tolist() == [[1, 2, 4, 0]]
    router = build("sigmoid", "none", num_groups=4, group_topk=2)
    assert router(torch.zeros(300, WIDTH)).expert_TK.unique(dim=0).tolist() == [[0, 1, 2]]


def test_company_changes_nothing():
    router, x = build("softmax", "refine"), draw(60, WIDTH).round()  # rounded: products and sums are exact
    router.weight.data.round_(), router.refine.data.round_()
    together, alone = router(x), [router(row[None]) for row in x]
    assert torch.equal(together.expert_TK, torch.cat([r.expert_TK for r in alone]))
    assert torch.equal(together.weight_TK, torch.cat([r.weight_TK for r in alone]))


def test_jitter():
    x_BSD, state = draw(3, 7, WIDTH), torch.get_rng_state()
    noise_BSD = jitter(x_BSD, 0.1, 5, ALONE)
    assert noise_BSD.shape == x_BSD.shape and torch.equal(noise_BSD, jitter(x_BSD.bfloat16(), 0.1, 5, ALONE))
    assert not torch.equal(noise_BSD, jitter(x_BSD, 0.1, 6, ALONE))
    assert torch.equal(state, torch.get_rng_state())
    router, x_TD, noise_TD = build("softmax"), x_BSD.flatten(0, 1), noise_BSD.flatten(0, 1)
    assert torch.equal(router(x_TD, noise_TD).logit_TE, router(x_TD * noise_TD).logit_TE)


def test_jitter_is_uniform():
    noise_BSD = jitter(torch.empty(2, 1000, EXPERTS, dtype=torch.bfloat16), 0.25, 1, ALONE)
    assert noise_BSD.dtype == torch.float32
    assert 0.75 <= noise_BSD.min() < 0.752 and 1.248 < noise_BSD.max() <= 1.25
    assert abs(noise_BSD.mean() - 1) < 0.005 and abs(noise_BSD.std() - 0.5 / 12**0.5) < 0.005


def test_ranks_that_share_the_sequence_share_the_noise():
    whole_BSD = jitter(torch.empty(2, 9, WIDTH), 0.1, 5, ALONE)
    parts = [jitter(torch.empty(2, 3, WIDTH), 0.1, 5, TensorRanks(index, 3)) for index in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), whole_BSD)


def test_no_tokens():
    routing = build("sigmoid", "refine", num_groups=4, group_topk=2)(torch.empty(0, WIDTH))
    assert routing.weight_TK.shape == routing.expert_TK.shape == (0, 3) and routing.logit_TE.shape == (0, EXPERTS)
