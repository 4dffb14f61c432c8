"""Every block on 2 and 4 tensor-parallel ranks against one process: outputs, gradients of inputs and of all weights.

A rank fills its parts from a block that is whole, runs both, and returns how far they are apart, relative to the
largest entry of the whole. Without sequence parallelism the input is whole on every rank, with it each has a stretch.
"""

import pytest
import reference
import torch
from ranks import run_ranks

from megatron_ds.config.model_schema import FullAttention, HybridAttention, ModelConfig, SoftGateAttention
from megatron_ds.model.context import Context
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.layer import DecoderLayer
from megatron_ds.model.mlp import MLP
from megatron_ds.model.norm import FinalNorm
from megatron_ds.model.vocabulary import Embedding, Output, tied_output
from megatron_ds.parallel.loss import cross_entropy_sum
from megatron_ds.parallel.shard import box_of, full_shape
from megatron_ds.parallel.tensor import ALONE

TOLERANCE = 1e-5
LENGTH = 12
ATTENTIONS = {
    "full": FullAttention(),
    "local": HybridAttention(pattern="L", window=3),
    "soft_gate_lse": SoftGateAttention(window=3),
    "soft_gate_bias": SoftGateAttention(window=3, implementation="bias"),
}
regions = pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])


def model(attention="full", heads=4, groups=4, **changes):
    """An odd width; 52 rows of the vocabulary, of which a fourth rank would have the last 13, 2 of them in use."""
    settings = {
        "num_layers": 2, "hidden_size": 33, "kv_channels": 6, "num_attention_heads": heads, "num_query_groups": groups,
        "ffn_hidden_size": 20, "vocab_size": 41, "make_vocab_size_divisible_by": 26,
        "attention": ATTENTIONS[attention],
    }  # fmt: skip
    return ModelConfig(**settings | changes)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(length):
    """Two rows of two documents each."""
    return reference.packed([[length // 3, length - length // 3], [1, length - 1]], length)


def own(whole, part):
    return whole[tuple(slice(begin, end) for begin, end in box_of(part))]


def fill(block, whole):
    """Weights of ``whole`` that are large enough to matter, and this rank's part of them in ``block``."""
    parts = dict(block.named_parameters())
    for seed, (name, weight) in enumerate(whole.named_parameters()):
        weight.data = draw(*weight.shape, seed=seed) * 0.3 + (1.0 if "norm" in name else 0.0)
        assert full_shape(parts[name]) == weight.shape, name
        parts[name].data = own(weight.data, parts[name]).clone()


def distance(got, whole, cut=lambda x: x):
    """Largest difference from this rank's part of ``whole``, relative to the largest entry of all of it."""
    want = cut(whole)
    assert got.shape == want.shape
    return float((got - want).abs().max() / whole.abs().max())


def gradient_distances(ranks, block, whole):
    """The same for the gradients of all weights, completed over the ranks."""
    ranks.sum_gradients((p, p.grad) for p in block.parameters())
    gradients = {name: weight.grad for name, weight in whole.named_parameters()}
    return {
        name: distance(part.grad, gradients[name], lambda x, part=part: own(x, part))
        for name, part in block.named_parameters()
    }


def distances(ranks, block, whole, x, call=lambda module, x: module(x), columns=False):
    """How far a block is from the whole one, by what is compared; ``columns``: outputs are cut by their last axis."""
    fill(block, whole)
    stretch = ranks.stretch if ranks.splits_sequence else lambda x: x
    mine = (lambda x: x.chunk(ranks.size, -1)[ranks.index]) if columns else stretch
    part = stretch(x).clone().requires_grad_() if x.is_floating_point() else x
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    out, expected = call(block, part), call(whole, x)
    scale = draw(*expected.shape, seed=99)
    (out * mine(scale)).sum().backward()
    (expected * scale).sum().backward()
    result = {"output": distance(out.detach(), expected.detach(), mine)}
    if x.is_floating_point():
        result["input"] = distance(part.grad, x.grad, stretch)
    return result | gradient_distances(ranks, block, whole)


def run_blocks(function, size, sequence_parallel, *arguments, tolerance=TOLERANCE):
    """Run ``function(groups, *arguments)``; every distance on every rank is small."""
    layout = {"tensor_model_parallel_size": size, "sequence_parallel": sequence_parallel}
    for rank, result in enumerate(run_ranks(function, size, *arguments, parallel=layout)):
        far = {name: value for name, value in result.items() if not value <= tolerance}
        assert result and not far, f"rank {rank}: {far}"


def vocabulary_blocks(groups, config, length):
    ranks, context = groups.tensor, Context.build(config, *packed(length))
    token_BS = torch.randint(41, (2, length), generator=torch.Generator().manual_seed(3))
    with_context = lambda module, x: module(x, context)  # noqa: E731
    tied = lambda embedding, x: tied_output(embedding, x, context)  # noqa: E731
    x_BSD = draw(2, length, 33, seed=4)
    blocks = {
        "mlp": distances(ranks, MLP(33, 20, ranks), MLP(33, 20), x_BSD),
        "embedding": distances(ranks, Embedding(config, ranks), Embedding(config), token_BS, with_context),
        "norm": distances(ranks, FinalNorm(config, ranks), FinalNorm(config), x_BSD, with_context),
        "output": distances(ranks, Output(config, ranks), Output(config), x_BSD, with_context, columns=True),
        "tied": distances(ranks, Embedding(config, ranks), Embedding(config), x_BSD, tied, columns=True),
    }
    return {f"{block}.{name}": value for block, values in blocks.items() for name, value in values.items()}


@regions
@pytest.mark.parametrize("stretch", [1, 3])
def test_feed_forward_norm_and_vocabulary(size, sequence_parallel, stretch):
    run_blocks(vocabulary_blocks, size, sequence_parallel, model(), stretch * size)


def layer(groups, configs, length):
    """Decoder layers, so that both norms are there, too."""
    result = {}
    for number, config in enumerate(configs):
        context = Context.build(config, *packed(length))
        blocks = DecoderLayer(config, 1, None, groups), DecoderLayer(config, 1)
        call = lambda module, x, context=context: module(x, context)  # noqa: E731
        for name, value in distances(groups.tensor, *blocks, draw(2, length, 33, seed=4), call).items():
            result[f"{number}: {config.attention} {config.num_kv_heads} {name}"] = value
    return result


@regions
def test_decoder_layers(size, sequence_parallel):
    """Every attention, with key heads that are whole groups of ranks', one each, or shared by ranks."""
    configs = [model(attention, groups=groups) for attention in ATTENTIONS for groups in (4, 2, 1)]
    configs += [model(heads=8, groups=2), model(qk_layernorm=False, rotary_interleaved=True)]
    run_blocks(layer, size, sequence_parallel, configs, LENGTH)


@regions
def test_biases_of_queries_keys_and_values(size, sequence_parallel):
    """Whole groups of key heads per rank, one each, or one for several ranks, each with a part of the gradient."""
    configs = [model("local", groups=groups, add_qkv_bias=True, qk_layernorm=groups == 2) for groups in (4, 2, 1)]
    configs += [model("soft_gate_lse", heads=8, groups=2, add_qkv_bias=True)]
    run_blocks(layer, size, sequence_parallel, configs, LENGTH)


@pytest.mark.parametrize("size", [2, 4])
def test_the_shortest_stretch(size):
    run_blocks(layer, size, True, [model("local", groups=1)], size)


def whole_model(groups, config, recompute=None, dtype=torch.float32):
    ranks = groups.tensor
    decoder, whole = Decoder(config, groups=groups, recompute=recompute), Decoder(config)
    fill(decoder, whole)
    decoder, whole = decoder.to(dtype), whole.to(dtype)
    token_BS = torch.randint(41, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    label_T, counted_T = token_BS.roll(-1, 1).flatten(), draw(2 * LENGTH, seed=5) > -0.5
    losses = []
    for module, tensor in ((decoder, ranks), (whole, ALONE)):
        logits_TV = module(token_BS, *packed(LENGTH), dropout_seed=11).flatten(0, 1)
        losses.append(cross_entropy_sum(logits_TV, label_T, counted_T, 41, tensor))
        losses[-1].backward()
    loss, expected = (loss.detach() for loss in losses)
    return {"loss": distance(loss, expected)} | gradient_distances(ranks, decoder, whole)


@regions
@pytest.mark.parametrize(
    "changes", [{"add_qkv_bias": True}, {"untie_embeddings_and_output_weights": True, "hidden_dropout": 0.2}]
)
def test_a_whole_model(size, sequence_parallel, changes):
    """Its loss and every gradient; hidden dropout draws the masks of one process."""
    run_blocks(whole_model, size, sequence_parallel, model("soft_gate_lse", groups=2, **changes))


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_communicates_in_step(recompute):
    run_blocks(whole_model, 2, True, model("local", groups=1, hidden_dropout=0.2), recompute)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(sequence_parallel, dtype):
    config = model("soft_gate_lse", groups=1, hidden_dropout=0.2)
    run_blocks(whole_model, 2, sequence_parallel, config, None, dtype, tolerance=16 * torch.finfo(dtype).eps)


def attention_masks(groups, config):
    """Which outputs of the attention are the same on both ranks, whose weights are."""
    context = Context.build(config, *packed(LENGTH), dropout_seed=11)
    attention = DecoderLayer(config, 1, None, groups).attention
    for seed, (name, weight) in enumerate(attention.named_parameters()):
        weight.data = draw(*weight.shape, seed=seed) * 0.3 + (1.0 if "norm" in name else 0.0)
    shape = (2, config.num_attention_heads // groups.tensor.size, LENGTH, 6)
    q, k, v = (draw(*shape, seed=seed) for seed in (6, 7, 8))
    cores = [attention.core(q, k, v, None, context) for _ in range(2)]
    assert torch.equal(*cores)
    return cores[0]


def test_attention_dropout_differs_between_ranks():
    """They have different heads; and every rank makes its own mask again."""
    first, second = run_ranks(
        attention_masks, 2, model(attention_dropout=0.5), parallel={"tensor_model_parallel_size": 2}
    )
    assert not torch.equal(first, second)
    first, second = run_ranks(attention_masks, 2, model(), parallel={"tensor_model_parallel_size": 2})
    assert torch.equal(first, second)
