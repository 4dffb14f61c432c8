"""Frequencies bit-equal to Hugging Face's for every kind of context extension; the rotation against its definition."""

import pytest
import reference
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ds.config.schema import DefaultRope, LinearRope, Llama3Rope, ModelConfig, YarnRope
from megatron_ds.model.rotary import frequencies, rotary_tables, rotate

SCALINGS = [
    LinearRope(factor=4.0),
    Llama3Rope(factor=8.0, original_max_position_embeddings=512),
    Llama3Rope(factor=2.0, low_freq_factor=2.0, high_freq_factor=3.0, original_max_position_embeddings=64),
    YarnRope(factor=4.0, original_max_position_embeddings=512),
    YarnRope(factor=40.0, original_max_position_embeddings=64, beta_fast=8, beta_slow=2, attention_factor=1.25),
]


def config(scaling, base=10000.0):
    return ModelConfig(hidden_size=256, num_attention_heads=4, rotary_base=base, rope_scaling=scaling)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling.kind}-{scaling.factor}")
def test_frequencies_are_those_of_hugging_face(scaling, base):
    settings = scaling.model_dump(exclude={"kind"}, exclude_none=True)
    parameters = {"rope_type": scaling.kind, "rope_theta": base, **settings}
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, device="cpu")
    frequency, factor = frequencies(config(scaling, base))
    assert torch.equal(frequency, expected)
    assert factor == expected_factor


def test_tables_are_fp32_and_carry_the_attention_factor():
    position_BS = torch.tensor([[0, 1, 2000]])
    cos, sin = rotary_tables(config(YarnRope(factor=4.0, original_max_position_embeddings=512)), position_BS)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 3, 32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((1, 3, 32), 1.1386294**2), rtol=1e-5, atol=0)
    assert (cos[0, 0] == cos[0, 0, 0]).all() and not sin[0, 0].any()


def test_rotation_and_its_gradient():
    x = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    position_BS = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 100, 0, 3]])
    tables = rotary_tables(config(DefaultRope()), position_BS)
    y = rotate(x, *tables)
    assert y.shape == (2, 3, 5, 64) and y.is_contiguous()
    exact = x.detach().double().requires_grad_()
    expected = reference.rotary(exact, position_BS, 10000.0).transpose(1, 2)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    [got], [want] = torch.autograd.grad((y * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
