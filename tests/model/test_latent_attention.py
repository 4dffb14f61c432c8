"""Latent attention: an oracle that goes head by head, isolation, recompute, dropout, tensor-parallel ranks."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from test_tensor_parallel import distances, draw, packed, run_blocks

from megatron_ds.config.model_schema import DefaultRope, LatentAttention, ModelConfig, YarnRope
from megatron_ds.model.context import Context
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.latent_attention import LatentSelfAttention
from megatron_ds.model.layer import DecoderLayer
from megatron_ds.parallel.deferred import deferring

LENGTH = 71
KINDS = {
    "compressed": LatentAttention(q_lora_rank=14, kv_lora_rank=10, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=7),
    "plain": LatentAttention(kv_lora_rank=11, qk_head_dim=3, qk_pos_emb_head_dim=8, v_head_dim=12),
}
YARN = YarnRope(factor=8.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3)
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind="compressed", **changes):
    """An odd width; an epsilon so large that it must not reach the norms of the latents."""
    settings = {
        "num_layers": 2, "hidden_size": 33, "num_attention_heads": 4, "ffn_hidden_size": 20, "vocab_size": 41,
        "make_vocab_size_divisible_by": 26, "attention": KINDS[kind], "qk_layernorm": False,
        "rotary_interleaved": True, "norm_epsilon": 0.1, "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    return ModelConfig(**settings | changes)


def filled(module):
    for seed, (name, weight) in enumerate(module.named_parameters()):
        weight.data = draw(*weight.shape, seed=seed) * 0.3 + (1.0 if "norm" in name else 0.0)
    return module


def turned(x_BSK, position_BS, config):
    """Neighbouring channels as complex numbers, or halves; YaRN's frequencies one by one (arXiv 2309.00071)."""
    width, scaling, length, frequencies = x_BSK.shape[-1], config.rope_scaling, 1.0, []
    for pair in range(width // 2):
        frequency = config.rotary_base ** (-2 * pair / width)
        if scaling.kind == "yarn":
            turns = scaling.original_max_position_embeddings / (2 * math.pi)
            places = [
                width / 2 * math.log(turns / beta) / math.log(config.rotary_base)
                for beta in (scaling.beta_fast, scaling.beta_slow)
            ]
            low, high = max(math.floor(places[0]), 0), min(math.ceil(places[1]), width - 1)
            slow = min(max((pair - low) / max(high - low, 1e-3), 0), 1)
            frequency *= 1 - slow + slow / scaling.factor
            length = growth(scaling.mscale, scaling) / growth(scaling.mscale_all_dim, scaling)
        frequencies.append(frequency)
    turn = torch.polar(torch.tensor(length).double(), position_BS[..., None] * torch.tensor(frequencies).double())
    if config.rotary_interleaved:
        return torch.view_as_real(torch.view_as_complex(x_BSK.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    y = torch.complex(*x_BSK.chunk(2, -1)) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def growth(mscale, scaling):
    return 0.1 * mscale * math.log(scaling.factor) + 1


def oracle(held, config, x_BSD, document_BS, position_BS):
    """One head after the other, in the dtype of x."""
    sizes = config.attention
    plain, rotary, value = sizes.qk_head_dim, sizes.qk_pos_emb_head_dim, sizes.v_head_dim
    if sizes.q_lora_rank:
        small = reference.rms_norm(x_BSD @ held["query_down.weight"].T, held["query_norm.weight"], 1e-6)
        query = small @ held["query_up.weight"].T
    else:
        query = x_BSD @ held["query.weight"].T
    both = x_BSD @ held["key_value_down.weight"].T
    latent = reference.rms_norm(both[..., : sizes.kv_lora_rank], held["key_value_norm.weight"], 1e-6)
    key_value = latent @ held["key_value_up.weight"].T
    shared = turned(both[..., sizes.kv_lora_rank :], position_BS, config)
    scale = (plain + rotary) ** -0.5
    if config.rope_scaling.kind == "yarn":
        scale *= growth(config.rope_scaling.mscale_all_dim, config.rope_scaling) ** 2
    mask, outputs = reference.visible(document_BS), []
    for head in range(config.num_attention_heads):
        q = query[..., head * (plain + rotary) :][..., : plain + rotary]
        kv = key_value[..., head * (plain + value) :][..., : plain + value]
        score = q[..., :plain] @ kv[..., :plain].mT + turned(q[..., plain:], position_BS, config) @ shared.mT
        outputs.append((score * scale).masked_fill(~mask, -math.inf).softmax(-1) @ kv[..., plain:])
    return torch.cat(outputs, dim=-1) @ held["output.weight"].T


@every_kind
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}, {"rotary_interleaved": False}], ids=str)
def test_output_and_gradients_are_those_of_every_head_alone(kind, changes):
    config = model(kind, **changes)
    attention, packing = filled(LatentSelfAttention(config, 0)), packed(LENGTH)
    x, weight = draw(2, LENGTH, 33, seed=50).requires_grad_(), draw(2, LENGTH, 33, seed=51)
    held = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    exact = x.detach().double().requires_grad_()
    out, expected = attention(x, Context.build(config, *packing)), oracle(held, config, exact, *packing)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in attention.named_parameters():
        far = (parameter.grad - held[name].grad).abs().max() / held[name].grad.abs().max()
        assert far < 1e-5, name


def tokens(seed=1):
    return torch.randint(41, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@every_kind
def test_documents_are_isolated_to_the_bit(kind):
    decoder, token_BS = filled(Decoder(model(kind))), tokens()
    packing = reference.packed([[30, 20, 21], [71]], LENGTH)
    changed = token_BS.clone()
    changed[0, 30:50] = (changed[0, 30:50] + 1) % 41
    before, after = decoder(token_BS, *packing), decoder(changed, *packing)
    assert not torch.equal(before[0, 30:50], after[0, 30:50])
    for rows in (slice(0, 30), slice(50, 71)):
        assert torch.equal(before[0, rows], after[0, rows])
    assert torch.equal(before[1], after[1])


def gradients(decoder, wait=False):
    decoder.zero_grad()
    with deferring() if wait else torch.enable_grad() as queue:
        decoder(tokens(), *packed(LENGTH), dropout_seed=5).square().sum().backward()
    for compute in queue if wait else ():
        compute()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@every_kind
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_and_waiting_change_no_bit(kind, dropout):
    config = model(kind, attention_dropout=dropout)
    expected = gradients(filled(Decoder(config)))
    for recompute in (None, "selective", "full"):
        for wait in (False, True):
            got = gradients(filled(Decoder(config, recompute=recompute)), wait)
            assert all(torch.equal(got[name], expected[name]) for name in expected), (recompute, wait)


@every_kind
def test_selective_recompute_keeps_no_heads(kind):
    """Of what is S x heads wide, only the input of the output projection is kept."""
    sizes, config = KINDS[kind], model(kind)
    attention = filled(LatentSelfAttention(config, 0))

    def kept(recompute):
        context, storages = Context.build(config, *packed(LENGTH)), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            attention(draw(2, LENGTH, 33).requires_grad_(), replace(context, recompute_attention=recompute))
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    key = sizes.qk_head_dim + sizes.qk_pos_emb_head_dim
    heads = 2 * LENGTH * 4 * (2 * key + sizes.qk_head_dim + sizes.v_head_dim) * 4
    assert kept(False) - kept(True) >= heads


def test_dropout_is_of_the_layer_and_the_seed():
    config = model(attention_dropout=0.5)
    x, first, second = draw(2, LENGTH, 33), *(filled(LatentSelfAttention(config, layer)) for layer in (0, 1))
    contexts = [Context.build(config, *packed(LENGTH), dropout_seed=seed) for seed in (1, 2)]
    once = first(x, contexts[0])
    assert torch.equal(once, first(x, contexts[0]))
    assert not torch.equal(once, first(x, contexts[1]))
    assert not torch.equal(once, second(x, contexts[0]))
    assert torch.equal(first.eval()(x, contexts[0]), first(x, contexts[1]))


def layers(groups, configs, length):
    result = {}
    for config in configs:
        context = Context.build(config, *packed(length))
        blocks = DecoderLayer(config, 1, None, groups), DecoderLayer(config, 1)
        call = lambda module, x, context=context: module(x, context)  # noqa: E731
        for name, value in distances(groups.tensor, *blocks, draw(2, length, 33, seed=4), call).items():
            result[f"{config.attention.q_lora_rank} {config.rope_scaling.kind} {name}"] = value
    return result


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])
def test_tensor_parallel_layers(size, sequence_parallel):
    configs = [model(kind, rope_scaling=scaling) for kind in KINDS for scaling in (DefaultRope(), YARN)]
    run_blocks(layers, size, sequence_parallel, configs, 12)
