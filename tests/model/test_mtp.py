"""Multi-token prediction against an oracle that goes position by position; what it may see, and where gradients go."""

import copy
from functools import partial

import pytest
import reference
import torch
from ranks import run_ranks

from megatron_ds.config.model_schema import FullAttention, HybridAttention, ModelConfig
from megatron_ds.config.moe_schema import MoEConfig, has_experts
from megatron_ds.data.loader import Batch
from megatron_ds.model.context import Context
from megatron_ds.model.decoder import Decoder, layer_list, run
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.model.mtp import next_tokens
from megatron_ds.parallel.deferred import deferring
from megatron_ds.parallel.shard import box_of
from megatron_ds.train.objective import pretraining

LENGTH, VOCABULARY, WEIGHT = 20, 50, 0.7
PACKING = reference.packed([[8, 1, 11], [13, 7]], LENGTH)
every_end = pytest.mark.parametrize("tied", [True, False])


def model(depths=2, tied=True, **changes):
    settings = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 16, "mtp_num_layers": depths,
        "attention": HybridAttention(pattern="LG", window=3), "untie_embeddings_and_output_weights": not tied,
    }  # fmt: skip
    return ModelConfig(**settings | changes)


def drawn(name, shape):
    """Weights large enough for every part to matter, the same wherever they are asked for."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    return 1 + 0.2 * values if "norm" in name else 0.2 * values


def filled(config, moe=None, recompute=None):
    decoder = Decoder(config, moe, recompute=recompute)
    for name, parameter in decoder.named_parameters():
        parameter.data = drawn(name, parameter.shape)
    return decoder


def batch(seed=1, packing=PACKING):
    generator = torch.Generator().manual_seed(seed)
    token_BS1 = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
    counted_BS = torch.rand(2, LENGTH, generator=generator) < 0.8
    return Batch(token_BS1[:, :-1], token_BS1[:, 1:], counted_BS, *packing)


def predict(decoder, batch, **progress):
    return decoder(batch.token_BS, batch.document_BS, batch.position_BS, next_token_BS=batch.label_BS, **progress)


def gradients(decoder, batches, **progress):
    for number in batches:
        losses = pretraining(decoder.config)(predict(decoder, batch(number), **progress), batch(number))
        losses.total(WEIGHT).backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


def oracle(weights, config, batch):
    """Main loss and MTP loss, the latter position by position."""
    tokens = torch.cat((batch.token_BS, batch.label_BS[:, -1:]), dim=1).tolist()
    documents, packing = batch.document_BS.tolist(), (batch.document_BS, batch.position_BS)
    output_VD = weights.get("output.weight", weights["embedding.weight"])[:VOCABULARY]
    places = [(row, i) for row in range(2) for i in range(LENGTH)]
    hidden = reference.main_model(weights, config, batch.token_BS, *packing)

    def loss(row, i, target):
        return -(output_VD @ hidden[row, i]).log_softmax(0)[tokens[row][target]]

    main = sum(loss(row, i, i + 1) for row, i in places if batch.counted_BS[row, i])
    mtp = 0.0
    for depth in range(1, config.mtp_num_layers + 1):
        block = reference.below(weights, f"mtp.{depth - 1}.")
        joined = torch.zeros(2, LENGTH, 2 * config.hidden_size, dtype=torch.float64)
        for row, i in places:
            if i + depth <= LENGTH:
                known = weights["embedding.weight"][tokens[row][i + depth]]
                parts = (known, block["embedding_norm.weight"]), (hidden[row, i], block["hidden_norm.weight"])
                joined[row, i] = torch.cat([reference.rms_norm(x, weight, config.norm_epsilon) for x, weight in parts])
        x = joined @ block["projection.weight"].T
        index = config.num_layers + depth - 1
        x = reference.decoder_layer(reference.below(block, "layer."), config, index, x, *packing)
        hidden = reference.rms_norm(x, block["norm.weight"], config.norm_epsilon)
        for row, i in places:
            seen = range(i, i + depth + 1)
            if seen[-1] < LENGTH and batch.counted_BS[row, seen[-1]] and len({documents[row][j] for j in seen}) == 1:
                mtp = mtp + loss(row, i, i + depth + 1) / config.mtp_num_layers
    return main, mtp


@every_end
@pytest.mark.parametrize("depths", [1, 2])
def test_losses_and_gradients_of_the_plain_oracle(depths, tied):
    config = model(depths, tied)
    decoder = filled(config)
    exact = {name: p.detach().double().requires_grad_() for name, p in decoder.named_parameters()}
    main, mtp = oracle(exact, config, batch())
    losses = pretraining(config)(predict(decoder, batch()), batch())
    assert losses.main.item() == pytest.approx(main.item(), rel=1e-5)
    assert losses.mtp.item() == pytest.approx(mtp.item(), rel=1e-5)

    (main + WEIGHT * mtp).backward()
    for name, gradient in gradients(decoder, [1]).items():
        scale = exact[name].grad.abs().max()
        torch.testing.assert_close(gradient / scale, exact[name].grad / scale, rtol=0, atol=2e-5, check_dtype=False)


def test_documents_are_isolated_to_the_bit():
    """Predictions that count know their own document alone; the others belong to its last tokens."""
    before, packing, decoder = batch(), PACKING, filled(model())
    changed = copy.deepcopy(before)
    other_BS = packing[0] == torch.tensor([[2], [1]])
    changed.token_BS[other_BS] = (changed.token_BS[other_BS] + 1) % VOCABULARY
    changed.label_BS[:, :-1] = changed.token_BS[:, 1:]
    main, first, second = (predict(decoder, before) - predict(decoder, changed)).abs().amax(-1).split(2)
    for row, length in enumerate([8, 13]):
        assert not main[row, :length].any()
        assert not first[row, : length - 1].any() and not second[row, : length - 2].any()
    assert first[1, 12] > 0 and second[1, 11] > 0, "the next document's tokens were joined in, without a target"


@every_end
def test_evaluation_is_that_of_the_main_model(tied):
    decoder, plain = filled(model(tied=tied)).eval(), filled(model(depths=0, tied=tied)).eval()
    logits = decoder(batch().token_BS, *PACKING)
    assert torch.equal(logits, plain(batch().token_BS, *PACKING))
    assert pretraining(decoder.config)(logits, batch()).mtp is None
    assert torch.equal(predict(decoder, batch())[:2], logits), "the main rows come first"


@every_end
def test_further_tokens_train_the_whole_model(tied):
    decoder = filled(model(tied=tied))
    pretraining(decoder.config)(predict(decoder, batch()), batch()).mtp.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_bit(recompute):
    config = model(hidden_dropout=0.2, attention_dropout=0.1)
    kept = gradients(filled(config), [1, 2], dropout_seed=3)
    again = gradients(filled(config, recompute=recompute), [1, 2], dropout_seed=3)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


def test_full_recompute_keeps_less_of_the_blocks():
    def kept(recompute):
        sizes = []
        pack = lambda x: (sizes.append(x.numel()), x)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            predict(filled(model(depths=4, num_layers=1), recompute=recompute), batch())
        return sum(sizes)

    assert kept("full") < 0.5 * kept(None)


def test_the_two_uses_of_the_embedding_have_masks_of_their_own():
    config = model(hidden_dropout=0.5)
    embedding = filled(config).embedding
    embedding.weight.data.fill_(1.0)
    token_BS = batch().token_BS

    def kept():
        context = Context.build(config, *PACKING, dropout_seed=3, next_token_BS=token_BS)
        x_BSD = embedding(token_BS, context)
        torch.rand(5)
        return next_tokens(embedding, x_BSD, context, depths=2)[:, :-1].chunk(3, dim=-1)

    first, *further = kept()
    assert all(0.4 < (mask == 0).float().mean() < 0.6 for mask in (first, *further))
    assert not torch.equal(first, further[0]) and not torch.equal(*further)
    assert all(map(torch.equal, kept(), (first, *further)))
    embedding.eval()
    assert all((mask == 1).all() for mask in kept())


@every_end
def test_a_list_with_blocks(tied):
    """The names, the order, and a last stage with a copy of the embedding: the alias of one process has its bits."""
    config = model(tied=tied, hidden_dropout=0.2)
    entries = layer_list(config)
    assert [entry.name for entry in entries] == [
        "embedding", "layers.0", "layers.1", "norm", "next_tokens", "mtp", "output",
    ]  # fmt: skip
    assert [entry.name for entry in entries if entry.tied] == ["embedding", "next_tokens"] + ["output"] * tied
    whole = filled(config)
    whole.embedding.late_weight = whole.embedding.weight.detach().requires_grad_()
    parts = {entry.name: entry.build() for entry in entries if entry.call is None}
    for name, module in parts.items():
        module.load_state_dict(whole.get_submodule(name).state_dict())
    late = copy.deepcopy(parts["embedding"])
    chain = [partial(entry.call, late) if entry.call else parts[entry.name] for entry in entries]
    for number in (1, 2):
        context = Context.build(config, *PACKING, dropout_seed=3, next_token_BS=batch(number).label_BS)
        logits = run(chain[3:], run(chain[:3], batch(number).token_BS, context), context)
        pretraining(config)(logits, batch(number)).total(WEIGHT).backward()
    ours = gradients(whole, [1, 2], dropout_seed=3)
    for name, module in parts.items():
        for rest, parameter in module.named_parameters():
            assert torch.equal(ours[f"{name}.{rest}"], parameter.grad), (name, rest)
    assert torch.equal(whole.embedding.late_weight.grad, late.weight.grad)


@every_end
def test_weight_gradients_that_wait_have_the_same_bits(tied):
    decoder, deferred = filled(model(tied=tied)), filled(model(tied=tied))
    expected = gradients(decoder, [1, 2])
    for number in (1, 2):
        with deferring() as queue:
            gradients(deferred, [number])
        assert len(queue) > 10
        for add in queue:
            add()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in deferred.named_parameters())


@pytest.mark.parametrize(
    ("frequency", "layers", "sparse"),
    [((0, 1), 2, True), ((1, 0), 2, False), (1, 2, True), (2, 3, True), (2, 4, False)],
)
def test_blocks_have_experts_if_the_last_layer_has(frequency, layers, sparse):
    config = model(num_layers=layers)
    moe = MoEConfig(num_experts=4, moe_layer_freq=frequency, moe_ffn_hidden_size=16, dispatcher="local")
    decoder = Decoder(config, moe)
    indices = [block.layer.mlp.index for block in decoder.mtp if isinstance(block.layer.mlp, SparseMLP)]
    assert indices == ([layers, layers + 1] if sparse else [])
    assert has_experts(config, moe, layers) == has_experts(config, moe, layers + 1) == sparse
    assert not has_experts(config, None, layers)


def test_auxiliary_losses_of_the_blocks_count():
    def router_gradient(coefficient):
        moe = MoEConfig(
            num_experts=4, moe_layer_freq=(0, 1), moe_ffn_hidden_size=16, dispatcher="local",
            moe_z_loss_coeff=coefficient,
        )  # fmt: skip
        decoder = filled(model(), moe)
        found = gradients(decoder, [1])
        losses = [block.layer.mlp.balance.take_loss() for block in decoder.mtp]
        return losses, [found[f"mtp.{k}.layer.mlp.router.weight"] for k in range(2)]

    (no_losses, without), (losses, with_losses) = router_gradient(0.0), router_gradient(1.0)
    assert no_losses == [0.0, 0.0] and min(losses) > 0
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(without, with_losses, strict=True))


def tensor_parallel_gradients(groups, config):
    decoder = Decoder(config, groups=groups)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
    boxes = {name: box_of(parameter) for name, parameter in decoder.named_parameters()}
    for name, parameter in decoder.named_parameters():
        parameter.data = drawn(name, shapes[name])[tuple(slice(*bounds) for bounds in boxes[name])].clone()
    losses = pretraining(config, groups.tensor)(predict(decoder, batch(), dropout_seed=3), batch())
    losses.total(WEIGHT).backward()
    groups.tensor.sum_gradients((parameter, parameter.grad) for parameter in decoder.parameters())
    return losses.mtp.item(), {name: (boxes[name], p.grad) for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_agree_with_one(sequence_parallel):
    config = model(tied=False, hidden_dropout=0.2, attention=FullAttention())
    decoder = filled(config)
    losses = pretraining(config)(predict(decoder, batch(), dropout_seed=3), batch())
    losses.total(WEIGHT).backward()
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    for loss, found in run_ranks(tensor_parallel_gradients, 2, config, parallel=layout):
        assert loss == pytest.approx(losses.mtp.item(), rel=1e-5)
        for name, parameter in decoder.named_parameters():
            box, gradient = found[name]
            expected = parameter.grad[tuple(slice(*bounds) for bounds in box)]
            atol = 1e-5 * parameter.grad.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol, msg=lambda text, name=name: name + text)
