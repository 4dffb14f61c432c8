"""Frequencies bit-equal to Hugging Face's for every kind of context extension; the rotation against its definition."""

import pytest
import reference
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import yarn_apply_mscale as v2_score_scale
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale as v3_score_scale
from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeRotaryEmbedding, apply_rotary_pos_emb

from megatron_ds.config.model_schema import (
    DefaultRope,
    LatentAttention,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    YarnRope,
)
from megatron_ds.model.rotary import frequencies, rotary_tables, rotate, score_growth

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


PERMUTATION_K = torch.arange(64).view(2, 32).T.flatten()
"""Channel of the half-split layout that stands at each place of the interleaved one: 0, 32, 1, 33 ..."""


def queries(dtype=torch.float32):
    return torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_interleaved_is_half_split_with_permuted_channels():
    """The same numbers in the same operations: equal to the last bit, gradient included."""
    tables = rotary_tables(config(DefaultRope()), torch.tensor([[0, 1, 2, 0, 1], [7, 8, 100, 0, 3]]))
    half, neighbours = queries().requires_grad_(), queries()[..., PERMUTATION_K].requires_grad_()
    expected, y = rotate(half, *tables)[..., PERMUTATION_K], rotate(neighbours, *tables, interleaved=True)
    assert y.is_contiguous() and torch.equal(y, expected)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    [got] = torch.autograd.grad((y * weight).sum(), neighbours)
    [want] = torch.autograd.grad((expected * weight).sum(), half)
    assert torch.equal(got, want[..., PERMUTATION_K])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interleaved_is_ernies_rotation(dtype):
    """In 16 bits too, as both rotate in fp32 and round once."""
    x, position_BS = queries(dtype), torch.tensor([[0, 1, 2, 3, 2000], [7, 8, 100, 0, 3]])
    scaling = YarnRope(factor=4.0, original_max_position_embeddings=512)
    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, **scaling.model_dump(exclude={"kind"}, exclude_none=True)}
    theirs = Ernie4_5_MoeConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    cos_sin = Ernie4_5_MoeRotaryEmbedding(theirs)(x, position_BS)
    expected, _ = apply_rotary_pos_emb(x, x, *cos_sin, unsqueeze_dim=2)
    y = rotate(x, *rotary_tables(config(scaling), position_BS), interleaved=True)
    assert y.dtype == dtype
    torch.testing.assert_close(y.transpose(1, 2), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_interleaved_takes_any_strides():
    tables = rotary_tables(config(DefaultRope()), torch.arange(5).expand(2, 5))
    strided = queries().movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(rotate(strided, *tables, interleaved=True), rotate(queries(), *tables, interleaved=True))


DEEPSEEK_SCALINGS = [
    YarnRope(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),  # V3
    YarnRope(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),  # V2
    YarnRope(factor=4.0, original_max_position_embeddings=128, mscale=1.5, mscale_all_dim=0.5, beta_fast=16),
    YarnRope(factor=4.0, original_max_position_embeddings=128, mscale=1.5, mscale_all_dim=0.5, attention_factor=1.1),
    YarnRope(factor=4.0, original_max_position_embeddings=128, mscale_all_dim=0.5),
    YarnRope(factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.0),
    YarnRope(factor=1.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0),
    YarnRope(factor=4.0, original_max_position_embeddings=128),
    DefaultRope(),
]


@pytest.mark.parametrize("scaling", DEEPSEEK_SCALINGS, ids=str)
@pytest.mark.parametrize("family", [DeepseekV2Config, DeepseekV3Config])
def test_yarn_is_deepseeks_to_the_bit(family, scaling):
    """Of the channels with a position alone, which are fewer than a head has; and the scores' own factor."""
    settings = scaling.model_dump(exclude={"kind"}, exclude_none=True)
    parameters = {"rope_type": scaling.kind, "rope_theta": 10000.0, **settings}
    theirs = family(hidden_size=256, num_attention_heads=4, qk_rope_head_dim=24, rope_parameters=parameters)
    attention = LatentAttention(qk_pos_emb_head_dim=24, qk_head_dim=40)
    ours = ModelConfig(hidden_size=256, num_attention_heads=4, attention=attention, rope_scaling=scaling)
    frequency, factor = frequencies(ours)
    if scaling.kind == "yarn":
        expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    else:
        expected, expected_factor = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(theirs)
    assert torch.equal(frequency, expected) and factor == expected_factor
    for score_scale in (v2_score_scale, v3_score_scale):
        assert score_growth(ours) * 64**-0.5 == pytest.approx(score_scale(theirs.rope_parameters, 64**-0.5), rel=1e-15)
    cos, sin = rotary_tables(ours, torch.tensor([[0, 5, 3000]]))
    assert cos.shape == sin.shape == (1, 3, 12)
