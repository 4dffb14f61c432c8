"""Initial weights: the documented table, and independence of which layers are filled, in which order and where."""

import math
import re

import pytest
import torch

from megatron_ds.config.model_schema import ModelConfig, SoftGateAttention
from megatron_ds.config.moe_schema import MoEConfig, SoftmaxRouter
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.init import initialize
from megatron_ds.parallel.random import derive_seed
from megatron_ds.parallel.shard import Shard

CONFIG = ModelConfig(
    num_layers=3, hidden_size=96, num_attention_heads=6, num_query_groups=2, vocab_size=1000, init_method_std=0.05,
    attention=SoftGateAttention(initial_gate=0.8), untie_embeddings_and_output_weights=True,
)  # fmt: skip
MOE = MoEConfig(
    moe_layer_freq=(0, 1, 1), router=SoftmaxRouter(fine="refine"), moe_ffn_hidden_size=64,
    moe_shared_expert_intermediate_size=40,
)  # fmt: skip

RESIDUAL = ("attention.output.weight", "mlp.down.weight", "mlp.experts.down", "mlp.shared.down.weight")


def weights(seed=1, config=CONFIG, moe=None):
    decoder = Decoder(config, moe)
    initialize(decoder.named_parameters(), config, seed)
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def test_documented_table():
    std = 0.05
    for name, weight in weights(moe=MOE).items():
        last = re.sub(r"^layers\.\d+\.", "", name)
        if last == "attention.far_gate.bias":
            assert torch.allclose(weight.sigmoid(), torch.tensor(0.8))
        elif last == "attention.far_gate.weight":
            assert not weight.any()
        elif "norm" in last:
            assert (weight == 1).all()
        else:
            residual = last in RESIDUAL
            drawn = weight[:1000] if name in ("embedding.weight", "output.weight") else weight
            expected = std / math.sqrt(2 * 3) if residual else std / 10 if last == "mlp.router.refine" else std
            assert drawn.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * drawn.numel()))
            assert abs(drawn.mean().item()) < 6 * expected / math.sqrt(drawn.numel())


def test_padding_rows_are_zero_and_change_nothing_else():
    padded = weights()
    unpadded = weights(config=CONFIG.model_copy(update={"make_vocab_size_divisible_by": 1}))
    for name in ("embedding.weight", "output.weight"):
        assert padded[name].shape[0] == 1024 and not padded[name][1000:].any()
        assert torch.equal(padded[name][:1000], unpadded[name])


def test_every_parameter_is_drawn_by_its_name_alone():
    whole = weights()
    some = {name: torch.empty_like(whole[name]) for name in reversed(whole) if name.startswith("layers.2.")}
    initialize(some.items(), CONFIG, seed=1)
    assert all(torch.equal(value, whole[name]) for name, value in some.items())
    assert not torch.equal(whole["layers.0.mlp.up.weight"], whole["layers.1.mlp.up.weight"])
    assert not torch.equal(whole["layers.0.mlp.up.weight"], whole["layers.0.mlp.gate.weight"])
    assert not torch.equal(whole["layers.0.mlp.up.weight"], weights(seed=2)["layers.0.mlp.up.weight"])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_experts_of_all_ranks_are_those_of_one_process(ranks):
    whole = weights(moe=MOE)
    for name in ("layers.1.mlp.experts.gate_up", "layers.2.mlp.experts.down"):
        parts = []
        for rank in range(ranks):
            part = torch.nn.Parameter(torch.empty(8 // ranks, *whole[name].shape[1:]))
            initialize([(name, Shard("expert", 0, rank, ranks).attach(part))], CONFIG, seed=1)
            parts.append(part.detach())
        assert torch.equal(torch.cat(parts), whole[name])


@pytest.mark.parametrize("dim", [0, 1])
def test_any_cut_of_a_weight_is_a_part_of_the_whole(dim):
    whole = weights(moe=MOE)
    for name in ("layers.0.mlp.up.weight", "layers.1.mlp.experts.gate_up", "embedding.weight"):
        parts = []
        for index in range(2):
            part = torch.nn.Parameter(torch.empty_like(whole[name].chunk(2, dim)[0]))
            initialize([(name, Shard("tensor", dim, index, 2).attach(part))], CONFIG, seed=1)
            parts.append(part.detach())
        assert torch.equal(torch.cat(parts, dim), whole[name])


@pytest.mark.parametrize("name, shape", [("gate_up", (4, 2, 6, 10)), ("down", (4, 10, 6))])
def test_experts_that_are_cut_twice(name, shape):
    """Over experts and over their width; in one process gate_up has the values of a stack [E, 2F, D]."""
    name = f"layers.1.mlp.experts.{name}"
    whole = torch.empty(shape)
    initialize([(name, whole)], CONFIG, seed=1)
    for expert in range(2):
        for column in range(3):
            part = torch.nn.Parameter(whole.chunk(2)[expert].chunk(3, 2)[column].clone().zero_())
            Shard("tensor", 2, column, 3).attach(Shard("expert", 0, expert, 2).attach(part))
            initialize([(name, part)], CONFIG, seed=1)
            assert torch.equal(part, whole.chunk(2)[expert].chunk(3, 2)[column])
    if len(shape) == 4:
        flat = torch.empty(4, 12, 10)
        initialize([(name, flat)], CONFIG, seed=1)
        assert torch.equal(flat, whole.flatten(1, 2))


def test_latent_attention_and_mtp_have_rules():
    latent = [f"attention.{name}.weight" for name in ("query_down", "query_up", "key_value_down", "key_value_up")]
    for name in [*(f"mtp.0.layer.{name}" for name in latent), "mtp.1.projection.weight"]:
        drawn = torch.empty(60, 50)
        initialize([(name, drawn)], CONFIG, seed=1)
        assert drawn.std().item() == pytest.approx(0.05, rel=4 / math.sqrt(2 * drawn.numel()))
    norms = ("layer.attention.query_norm", "layer.attention.key_value_norm", "embedding_norm", "hidden_norm", "norm")
    for name in norms:
        filled = torch.empty(7)
        initialize([(f"mtp.0.{name}.weight", filled)], CONFIG, seed=1)
        assert (filled == 1).all()
    output = torch.empty(60, 50)
    initialize([("mtp.0.layer.attention.output.weight", output)], CONFIG, seed=1)
    expected = 0.05 / math.sqrt(2 * CONFIG.num_layers)  # decoder layers only
    assert output.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * output.numel()))


def test_an_expert_is_seeded_by_its_number():
    experts_EHD = weights(moe=MOE)["layers.1.mlp.experts.gate_up"]
    assert len({expert_HD.sum().item() for expert_HD in experts_EHD}) == 8
    generator = torch.Generator().manual_seed(derive_seed(1, "layers.1.mlp.experts.gate_up", 5))
    assert torch.equal(experts_EHD[5].view(128, 96), torch.randn(128, 96, generator=generator) * 0.05)


def test_an_unknown_name_is_our_bug():
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.bias"):
        initialize([("layers.0.mlp.bias", torch.empty(3))], CONFIG, seed=1)
