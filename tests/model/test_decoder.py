"""The whole decoder: a plain reference, stock transformers, isolation, recompute, dropout, slices of the layer list."""

import re
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_ds.config.model_schema import (
    DefaultRope,
    FullAttention,
    HybridAttention,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    SoftGateAttention,
    WindowGrowth,
    YarnRope,
)
from megatron_ds.model.context import Context, window_at
from megatron_ds.model.decoder import Decoder, layer_list, run
from megatron_ds.model.vocabulary import tied_output
from megatron_ds.parallel.deferred import deferring
from megatron_ds.parallel.loss import cross_entropy_sum

LENGTH = 83
ATTENTIONS = {
    "full": FullAttention(),
    "hybrid": HybridAttention(pattern="LG", window=9),
    "soft_gate_lse": SoftGateAttention(window=9),
    "soft_gate_bias": SoftGateAttention(window=9, implementation="bias"),
}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def model(attention="hybrid", **changes):
    """A small configuration; ``attention`` is one of ``ATTENTIONS`` or a section of its own."""
    settings = {
        "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "vocab_size": 50, "make_vocab_size_divisible_by": 16, "attention": ATTENTIONS.get(attention, attention),
    }  # fmt: skip
    return ModelConfig(**settings | changes)


def filled(config, recompute=None, seed=0):
    """A decoder whose weights are large enough for every part of it to matter, norms and gates included."""
    decoder = Decoder(config, recompute=recompute)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * drawn if "norm" in name else 0.2 * drawn
    return decoder


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_gradients(decoder, *inputs, **settings):
    logits = decoder(*inputs, **settings).flatten(0, 1)
    counted = torch.ones(len(logits), dtype=torch.bool)
    cross_entropy_sum(logits, inputs[0].flatten(), counted, 50).backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


@every_attention
@pytest.mark.parametrize("changes", [{}, {"qk_layernorm": False, "untie_embeddings_and_output_weights": True}])
def test_plain_reference_with_packed_documents(attention, changes):
    config = model(attention, **changes)
    decoder, token_BS = filled(config), tokens()
    packing = reference.packed([[1, 30, 52], [60, 23]], LENGTH)
    exact = {name: p.detach().double().requires_grad_() for name, p in decoder.named_parameters()}
    expected = reference.decoder(exact, config, token_BS, *packing)
    torch.testing.assert_close(decoder(token_BS, *packing).double(), expected, rtol=2e-5, atol=2e-5)

    F.cross_entropy(expected[..., :50].flatten(0, 1), token_BS.flatten(), reduction="sum").backward()
    for name, gradient in loss_gradients(decoder, token_BS, *packing).items():
        scale = exact[name].grad.abs().max()
        torch.testing.assert_close(gradient / scale, exact[name].grad / scale, rtol=0, atol=2e-5, check_dtype=False)


THEIR_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj", "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}  # fmt: skip


def their_name(name):
    """Logical name -> transformers' name."""
    layer, ours = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
    return f"model.{layer}{THEIR_NAMES[ours]}.weight" if layer else f"{THEIR_NAMES[ours]}.weight"


def transformers_logits(config, decoder, token_BS):
    """Logits of the stock model with the decoder's weights."""
    scaling = config.rope_scaling.model_dump(exclude={"kind"}, exclude_none=True)
    settings = {
        "vocab_size": config.padded_vocab_size, "hidden_size": config.hidden_size, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size, "num_hidden_layers": config.num_layers, "rms_norm_eps": 1e-6,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_kv_heads,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights, "attn_implementation": "eager",
        "rope_parameters": {"rope_type": config.rope_scaling.kind, "rope_theta": config.rotary_base, **scaling},
    }  # fmt: skip
    if isinstance(config.attention, HybridAttention):
        names = {"L": "sliding_attention", "G": "full_attention"}
        pattern = config.attention.pattern * config.num_layers
        settings |= {
            "layer_types": [names[letter] for letter in pattern[: config.num_layers]],
            "use_sliding_window": True, "sliding_window": config.attention.window + 1,
        }  # fmt: skip
    if config.qk_layernorm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**settings))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**settings))
    state = {their_name(name): weight for name, weight in decoder.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    with torch.no_grad():
        return theirs.eval()(token_BS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 4, "kv_channels": 24},
        {"attention": HybridAttention(pattern="LLG", window=1)},
        {"attention": HybridAttention(pattern="LG", window=LENGTH - 2)},
        {"attention": HybridAttention(pattern="L", window=LENGTH + 5)},
        {"untie_embeddings_and_output_weights": True, "rotary_base": 500000.0},
        {"qk_layernorm": False, "attention": FullAttention()},
        {"rope_scaling": LinearRope(factor=4.0)},
        {"rope_scaling": Llama3Rope(factor=4.0, original_max_position_embeddings=32)},
        {"rope_scaling": YarnRope(factor=4.0, original_max_position_embeddings=32)},
        {"rope_scaling": DefaultRope(), "num_query_groups": 1, "num_layers": 1},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_transformers_computes_the_same(changes):
    config = model(**changes)
    decoder, token_BS = filled(config), tokens()
    with torch.no_grad():
        logits = decoder(token_BS)
    assert (logits - transformers_logits(config, decoder, token_BS)).abs().max() <= 2e-5


@every_attention
def test_documents_are_isolated_to_the_bit(attention):
    decoder, token_BS = filled(model(attention)), tokens()
    packing = reference.packed([[40, 20, 23], [83]], LENGTH)
    changed = token_BS.clone()
    changed[0, 40:60] = (changed[0, 40:60] + 1) % 50
    before, after = decoder(token_BS, *packing), decoder(changed, *packing)
    assert torch.equal(before[0, :40], after[0, :40])
    assert torch.equal(before[0, 60:], after[0, 60:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 40:60], after[0, 40:60])


@every_attention
def test_a_packed_document_is_what_it_is_alone(attention):
    decoder, token_BS = filled(model(attention)), tokens(batch=1)
    together = decoder(token_BS, *reference.packed([[40, 43]], LENGTH))
    torch.testing.assert_close(together[:, 40:], decoder(token_BS[:, 40:]), rtol=1e-5, atol=1e-5)


@every_attention
def test_no_query_sees_the_future(attention):
    decoder, token_BS = filled(model(attention)), tokens()
    changed = token_BS.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 50
    assert torch.equal(decoder(token_BS)[:, :50], decoder(changed)[:, :50])


@every_attention
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_bit(attention, recompute):
    config = model(attention, hidden_dropout=0.2, attention_dropout=0.1)
    packing = reference.packed([[40, 43], [83]], LENGTH)
    kept = loss_gradients(filled(config), tokens(), *packing, dropout_seed=3)
    again = loss_gradients(filled(config, recompute), tokens(), *packing, dropout_seed=3)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_that_wait_change_no_bit(dtype, recompute):
    """Of two micro-batches, made up for after both backward passes."""
    config = model("soft_gate_lse", hidden_dropout=0.2, untie_embeddings_and_output_weights=True)
    at_once, late = (filled(config, recompute).to(dtype) for _ in range(2))
    for seed in (3, 4):
        loss_gradients(at_once, tokens(seed=seed), dropout_seed=seed)
    with deferring() as queue:
        for seed in (3, 4):
            gradients = loss_gradients(late, tokens(seed=seed), dropout_seed=seed)
    waiting = {name for name, gradient in gradients.items() if gradient is None}
    assert "output.weight" in waiting and len(waiting) == len(queue) / 2 == 7 * config.num_layers + 1
    for compute in queue:
        compute()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(at_once.parameters(), late.parameters()))


def test_full_recompute_keeps_less():
    def kept(recompute):
        sizes = []
        pack = lambda x: (sizes.append(x.numel()), x)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            filled(model(), recompute)(tokens())
        return sum(sizes)

    assert kept("full") < 0.5 * kept(None)


@every_attention
def test_dropout_depends_on_seed_and_layer_alone(attention):
    config = model(attention, hidden_dropout=0.2, attention_dropout=0.1)
    decoder = filled(config)
    first = decoder(tokens(), dropout_seed=3)
    torch.rand(5)
    assert torch.equal(decoder(tokens(), dropout_seed=3), first)
    assert not torch.equal(decoder(tokens(), dropout_seed=4), first)
    assert not torch.equal(decoder.eval()(tokens()), first)
    assert torch.equal(decoder(tokens()), decoder(tokens(), dropout_seed=3))


def test_training_with_dropout_needs_a_seed():
    with pytest.raises(AssertionError, match="dropout_seed"):
        filled(model(hidden_dropout=0.1))(tokens())


@pytest.mark.parametrize("tied", [True, False])
def test_slices_of_the_layer_list_make_the_model(tied):
    config = model(hidden_dropout=0.2, untie_embeddings_and_output_weights=not tied)
    whole, packing = filled(config), reference.packed([[40, 43], [83]], LENGTH)
    entries = layer_list(config)
    assert [entry.name for entry in entries] == ["embedding", "layers.0", "layers.1", "layers.2", "norm", "output"]
    built = {entry.name: entry.build() for entry in entries}
    for name, module in built.items():
        if name != "output" or not tied:
            module.load_state_dict(whole.get_submodule(name).state_dict())
    chain = [*built.values()]
    if tied:
        chain[-1] = partial(tied_output, built["embedding"])
    context = Context.build(config, *packing, dropout_seed=3)
    first_stage = run(chain[:3], tokens(), context)
    torch.rand(7)
    assert torch.equal(run(chain[3:], first_stage, context), whole(tokens(), *packing, dropout_seed=3))
    assert entries[0].tied == entries[-1].tied == tied


def test_window_growth():
    growing = HybridAttention(window=100, window_growth=WindowGrowth(start=20, iters=40))
    assert [window_at(growing, step) for step in (0, 10, 39, 40, 1000)] == [20, 40, 98, 100, 100]
    assert window_at(HybridAttention(), 5) is None and window_at(FullAttention(), 5) is None

    narrow = model(attention=HybridAttention(pattern="L", window=4))
    wide = model(attention=HybridAttention(pattern="L", window=9))
    growing = model(attention=HybridAttention(pattern="L", window=9, window_growth=WindowGrowth(start=4, iters=10)))
    assert torch.equal(filled(growing)(tokens(), step=0), filled(narrow)(tokens()))
    assert torch.equal(filled(growing)(tokens(), step=10), filled(wide)(tokens()))
    assert torch.equal(filled(growing)(tokens()), filled(wide)(tokens()))


def test_the_two_soft_gates_agree():
    by_lse, by_bias = (filled(model(attention))(tokens()) for attention in ("soft_gate_lse", "soft_gate_bias"))
    torch.testing.assert_close(by_lse, by_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate, same_as", [(-40.0, "L"), (40.0, "G")])
def test_a_soft_gate_spans_local_to_full(gate, same_as):
    hard = filled(model(attention=HybridAttention(pattern=same_as, window=9)))
    soft = Decoder(model("soft_gate_lse"))
    soft.load_state_dict(hard.state_dict(), strict=False)
    for layer in soft.layers:
        layer.attention.far_gate.weight.data.zero_()
        layer.attention.far_gate.bias.data.fill_(gate)
    torch.testing.assert_close(soft(tokens()), hard(tokens()), rtol=1e-5, atol=1e-5)


@every_attention
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_close_to_fp32(attention, dtype):
    decoder = filled(model(attention))
    exact = decoder(tokens())
    rounded = decoder.to(dtype)(tokens())
    assert rounded.dtype == dtype
    assert ((rounded.float() - exact).square().mean() / exact.square().mean()).sqrt() < 0.05
    assert all(g.dtype == dtype and g.isfinite().all() for g in loss_gradients(decoder, tokens()).values())


@every_attention
@pytest.mark.parametrize("length", [1, 2])
def test_shortest_samples(attention, length):
    config, token_BS = model(attention), tokens(batch=1, length=length)
    decoder = filled(config)
    exact = {name: p.detach().double() for name, p in decoder.named_parameters()}
    expected = reference.decoder(exact, config, token_BS, torch.zeros_like(token_BS), torch.arange(length)[None])
    torch.testing.assert_close(decoder(token_BS).double(), expected, rtol=2e-5, atol=2e-5)
