"""Parameter groups, and AdamW against its published arithmetic."""

import pytest
import torch
from torch import nn

from megatron_ds.config.deepspeed_keys import OptimizerKeys, OptimizerParams
from megatron_ds.optim.optimizers import OPTIMIZERS, build_optimizer


class Toy(nn.Module):
    """One of each kind of parameter that a decoder has."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.RMSNorm(6)
        self.query = nn.Linear(6, 6, bias=True)
        self.far_gate = nn.Linear(6, 2)


def keys(**params):
    return OptimizerKeys(params=OptimizerParams(**params))


def test_two_named_groups_in_a_fixed_order():
    model = Toy()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model.named_parameters(), keys(weight_decay=0.1), 1e-3).param_groups
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [[names[id(parameter)] for parameter in group["params"]] for group in groups] == [
        ["embedding.weight", "query.weight"],
        ["norm.weight", "query.bias", "far_gate.weight", "far_gate.bias"],
    ]


def test_frozen_parameters_are_left_out():
    model = Toy()
    model.embedding.requires_grad_(False)
    groups = build_optimizer(model.named_parameters(), keys(), 1e-3).param_groups
    assert [parameter.shape for parameter in groups[0]["params"]] == [(6, 6)]


def test_an_empty_group_is_our_bug_and_says_so():
    with pytest.raises(AssertionError, match="'no_decay' is empty on this rank"):
        build_optimizer([("weight", nn.Parameter(torch.zeros(2, 2)))], keys(), 1e-3)
    with pytest.raises(AssertionError, match="'decay' is empty on this rank"):
        build_optimizer([("weight", nn.Parameter(torch.zeros(2)))], keys(), 1e-3)


def test_every_optimizer_of_the_schema_exists():
    assert set(OPTIMIZERS) == {"AdamW"} == set(OptimizerKeys.model_fields["type"].annotation.__args__)


def test_adamw_equals_the_published_update():
    """Ten steps with a changing learning rate, in float64, against Algorithm 2 of arXiv 1711.05101."""
    beta1, beta2, eps, decay = 0.9, 0.95, 1e-8, 0.1
    model = Toy().double()
    optimizer = build_optimizer(model.named_parameters(), keys(betas=(beta1, beta2), eps=eps, weight_decay=decay), 1.0)
    want = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in want.items()}
    second = {name: torch.zeros_like(value) for name, value in want.items()}
    decayed = {"embedding.weight", "query.weight"}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 11):
        lr = 1e-2 / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            first[name] = beta1 * first[name] + (1 - beta1) * parameter.grad
            second[name] = beta2 * second[name] + (1 - beta2) * parameter.grad**2
            update = first[name] / (1 - beta1**step) / ((second[name] / (1 - beta2**step)).sqrt() + eps)
            want[name] = want[name] * (1 - lr * (decay if name in decayed else 0.0)) - lr * update
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-10, atol=1e-12)
