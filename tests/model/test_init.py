"""Initial weights: the documented table, and independence of which layers are filled, in which order and where."""

import math
import re

import pytest
import torch

from megatron_ds.config.schema import ModelConfig, SoftGateAttention
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.init import initialize

CONFIG = ModelConfig(
    num_layers=3, hidden_size=96, num_attention_heads=6, num_query_groups=2, vocab_size=1000, init_method_std=0.05,
    attention=SoftGateAttention(initial_gate=0.8), untie_embeddings_and_output_weights=True,
)  # fmt: skip


def weights(seed=1, config=CONFIG):
    decoder = Decoder(config)
    initialize(decoder.named_parameters(), config, seed)
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def test_documented_table():
    std = 0.05
    for name, weight in weights().items():
        last = re.sub(r"^layers\.\d+\.", "", name)
        if last == "attention.far_gate.bias":
            assert torch.allclose(weight.sigmoid(), torch.tensor(0.8))
        elif last == "attention.far_gate.weight":
            assert not weight.any()
        elif "norm" in last:
            assert (weight == 1).all()
        else:
            residual = last in ("attention.output.weight", "mlp.down.weight")
            drawn = weight[:1000] if name in ("embedding.weight", "output.weight") else weight
            expected = std / math.sqrt(2 * 3) if residual else std
            assert drawn.std().item() == pytest.approx(expected, rel=0.05)
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


def test_an_unknown_name_is_our_bug():
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.bias"):
        initialize([("layers.0.mlp.bias", torch.empty(3))], CONFIG, seed=1)
