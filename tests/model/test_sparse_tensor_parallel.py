"""The block with experts on tensor- and expert-parallel ranks against one process with all experts and all tokens.

Every data rank has a micro-batch of its own. The reference goes through them one after another: outputs, gradients of
inputs and of all weights, loads, auxiliary losses and the biases after the step are those of the ranks together.
"""

import functools

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.context import Context
from megatron_ds.model.moe.balance import update_bias
from megatron_ds.model.moe.sparse_mlp import SparseMLP, finish_step
from megatron_ds.parallel.shard import box_of, full_shape

TOLERANCE = 1e-5
"""Of the largest entry."""
BATCH, LENGTH, EXPERTS, RATE, SCALE = 2, 12, 8, 0.05, 0.5
LOSSES = {
    "moe_aux_loss_coeff": 0.3, "moe_seq_aux_loss_coeff": 0.2, "moe_global_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "shared": {"moe_shared_expert_intermediate_size": 12},
    "losses": {**LOSSES, "router": {"kind": "sigmoid", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}},
    "refine, jitter": {
        "router": {"kind": "softmax", "fine": "refine"},
        "moe_input_jitter_eps": 0.2,
        "moe_seq_aux_loss_coeff": 0.2,
    },
    "fixed capacity": {"capacity": {"kind": "fixed", "factor": 0.7, "drop_policy": "position"}, **LOSSES},
    "dynamic capacity": {"capacity": {"kind": "dynamic", "factor": 0.8}, "router": {"kind": "softmax", "fine": "none"}},
    "two busy experts": {"moe_aux_loss_coeff": 0.3},
    "odd widths": {"experts": "loop", "moe_shared_expert_intermediate_size": 20, "moe_ffn_hidden_size": 12},
}
LAYOUTS = {"tp 2": (2, 1), "tp 4": (4, 1), "tp 2, ep 2": (2, 2)}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
regions = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence parallel"])
cuts = pytest.mark.parametrize("cut", [False, True], ids=["whole experts", "cut experts"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parallel(tensor, expert, sequence_parallel, cut, **options):
    return {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": tensor if cut else 1,
        "sequence_parallel": sequence_parallel,
        **options,
    }


def configurations(variant, dispatcher="ring"):
    """Model and experts; the second of two layers has some."""
    hidden = 13 if variant == "odd widths" else 16
    model = ModelConfig(num_layers=2, hidden_size=hidden, num_attention_heads=2, kv_channels=4, ffn_hidden_size=16)
    options = {"num_experts": EXPERTS, "moe_layer_freq": (0, 1), "dispatcher": dispatcher}
    return model, MoEConfig(**options | VARIANTS[variant])


def fill(block, whole, variant):
    """Weights, biases and loads of ``whole``, and this rank's part of them in ``block``."""
    parts = dict((*block.named_parameters(), *block.named_buffers()))
    for seed, (name, weight) in enumerate((*whole.named_parameters(), *whole.named_buffers())):
        weight.data = 0.3 * draw(*weight.shape, seed=seed)
        if name.startswith("balance."):  # load_factor and share
            weight.data = weight.data.abs() / weight.data.abs().mean()
        if name == "router.bias" and variant == "two busy experts":
            weight.data = torch.where(torch.arange(EXPERTS) % 4 == 1, 5.0, -5.0)
        assert full_shape(parts[name]) == weight.shape, name
        parts[name].data = own(weight.data, parts[name]).clone()


def own(whole, part):
    return whole[tuple(slice(begin, end) for begin, end in box_of(part))]


def inputs(data, width):
    """x_BSD and the gradient of the output; all tokens have something in common, so that some experts are busy."""
    return draw(BATCH, LENGTH, width, seed=50 + data) + draw(width, seed=49), draw(BATCH, LENGTH, width, seed=70 + data)


def context(model, data, micro_batch):
    position_BS = torch.arange(LENGTH).expand(BATCH, -1)
    options = {"dropout_seed": 90 + data, "micro_batch": micro_batch, "auxiliary_scale": SCALE}
    return Context.build(model, torch.zeros_like(position_BS), position_BS, **options)


def reference(whole, model, data_ranks):
    """[output, gradient of the input, of each weight] of every data rank; loads and losses stay in ``whole``."""
    results = []
    for data in range(data_ranks):
        x_BSD, grad_BSD = inputs(data, model.hidden_size)
        x_BSD.requires_grad_()
        y_BSD = whole(x_BSD, context(model, data, micro_batch=data))
        weights = dict(whole.named_parameters())
        grad_x_BSD, *grads = torch.autograd.grad(y_BSD, (x_BSD, *weights.values()), grad_BSD)
        results.append((y_BSD.detach(), grad_x_BSD, dict(zip(weights, grads, strict=True))))
    return results


def distance(got, want):
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-3))


def distances(groups, variant, dispatcher, recompute=False):
    """How far the block on all ranks is from the whole one; and what finish_step made of it."""
    model, moe = configurations(variant, dispatcher)
    block, whole = SparseMLP(model, moe, 1, groups), SparseMLP(model, moe, 1, None)
    fill(block, whole, variant)
    data = groups.index("data")
    expected = reference(whole, model, groups.topology.data)
    y_BSD, grad_x_BSD, grads = expected[data]
    stretch = groups.tensor.stretch if groups.tensor.splits_sequence else lambda x: x

    x_BSD, grad_BSD = (stretch(x) for x in inputs(data, model.hidden_size))
    x_BSD = x_BSD.clone().requires_grad_()
    call = functools.partial(checkpoint, block, use_reentrant=False) if recompute else block
    out_BSD = call(x_BSD, context(model, data, micro_batch=0))
    out_BSD.backward(grad_BSD)
    groups.tensor.sum_gradients((p, p.grad) for p in block.parameters())
    result = {"output": distance(out_BSD.detach(), stretch(y_BSD)), "input": distance(x_BSD.grad, stretch(grad_x_BSD))}
    for name, part in block.named_parameters():
        of_all = "experts." in name  # the exchange brings the tokens of all data ranks
        want = sum(grads[name] for _, _, grads in expected) if of_all else grads[name]
        result[name] = distance(part.grad, own(want, part))
    return result | step(groups, block, whole, model, moe) | evaluation(block, whole, stretch(y_BSD), model, stretch)


def step(groups, block, whole, model, moe):
    """The end of the step: exact loads and biases, the mean of the auxiliary losses, all bytes."""
    (chosen_E, dropped_E), loss = whole.balance.take_counts(), whole.balance.take_loss()
    bias_E = None if block.router.bias is None else block.router.bias.clone()
    sent = sum(groups.gather_objects(block.dispatcher.traffic.bytes_sent))
    load = finish_step(nn.ModuleList([block]), model, moe, groups, RATE)
    assert load.layers == (1,) and load.bytes_sent_L.tolist() == [sent] and (sent > 0) == (groups.topology.expert > 1)
    assert torch.equal(load.chosen_LE[0], chosen_E) and torch.equal(load.dropped_LE[0], dropped_E)
    assert chosen_E.sum() == groups.topology.data * BATCH * LENGTH * moe.moe_router_topk
    assert (dropped_E.sum() > 0) == (moe.capacity.kind != "dropless")
    whole.balance.update(chosen_E)
    buffers = dict(block.balance.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in whole.balance.named_buffers())
    if bias_E is not None:
        assert torch.equal(load.bias_LE[0], bias_E)
        update_bias(whole.router.bias, whole.balance.load_factor, RATE)
        assert torch.equal(block.router.bias, whole.router.bias) and not torch.equal(block.router.bias, bias_E)
    return {"auxiliary loss": abs(float(load.auxiliary_loss_L[0]) - loss)}


@torch.no_grad()
def evaluation(block, whole, like_BSD, model, stretch):
    """Without noise, capacity and losses."""
    x_BSD, _ = inputs(7, model.hidden_size)
    outputs = [module.eval()(x, context(model, 7, 0)) for module, x in ((block, stretch(x_BSD)), (whole, x_BSD))]
    assert outputs[0].shape == like_BSD.shape and not block.balance.take_counts().any()
    return {"evaluation": distance(outputs[0], stretch(outputs[1]))}


def every_variant(groups, dispatchers):
    cases = [(variant, dispatcher) for variant in VARIANTS for dispatcher in dispatchers]
    return {f"{' '.join(case)} {name}": value for case in cases for name, value in distances(groups, *case).items()}


def assert_near(results):
    for rank, result in enumerate(results):
        far = {name: value for name, value in result.items() if not value <= TOLERANCE}
        assert result and not far, f"rank {rank}: {far}"


@layouts
@regions
@cuts
def test_equals_one_process(layout, sequence_parallel, cut):
    tensor, expert = LAYOUTS[layout]
    dispatchers = ("ring", "all_to_all") if expert > 1 else ("local",)
    options = parallel(tensor, expert, sequence_parallel, cut)
    assert_near(run_ranks(every_variant, tensor * expert, dispatchers, parallel=options))


@cuts
def test_nodes(cut):
    """Two nodes of two expert-parallel ranks, each of two tensor-parallel ranks."""
    options = parallel(2, 4, True, cut, expert_ranks_per_node=4)
    assert_near(run_ranks(distances, 8, "shared", "hierarchical", parallel=options))


@pytest.mark.parametrize("variant", ["losses", "refine, jitter", "fixed capacity"])
@cuts
def test_recompute(variant, cut):
    """Runs in step on all ranks, routes again as before, and counts once."""
    options = parallel(2, 2, True, cut)
    assert_near(run_ranks(distances, 4, variant, "ring", True, parallel=options))


def losses(groups):
    """The loss that each rank attached."""
    model, moe = configurations("losses")
    block, whole = SparseMLP(model, moe, 1, groups), SparseMLP(model, moe, 1, None)
    fill(block, whole, "losses")
    x_BSD, _ = inputs(0, model.hidden_size)
    stretch = groups.tensor.stretch if groups.tensor.splits_sequence else lambda x: x
    block(stretch(x_BSD), context(model, 0, 0))
    return block.balance.take_loss()


@cuts
def test_every_rank_has_the_same_loss(cut):
    first, *others = run_ranks(losses, 4, parallel=parallel(4, 1, True, cut))
    assert first > 0 and others == [first] * 3


def finish_a_step(groups):
    """Rank 0 has a decoder layer, rank 1 the last one and two MTP blocks, whose tokens it counts by hand."""
    model, moe = configurations("plain")
    model = model.model_copy(update={"num_layers": 4, "mtp_num_layers": 2})
    moe = moe.model_copy(update={"moe_layer_freq": (0, 1, 0, 1)})
    layers = [SparseMLP(model, moe, index, groups) for index in ((1,) if groups.rank == 0 else (3, 4, 5))]
    for layer in layers:
        chosen_TK = torch.full((layer.index, 2), layer.index)
        layer.balance.record(0, chosen_TK, chosen_TK)
        layer.balance.record_loss(0, torch.tensor(float(layer.index)))
    load = finish_step(nn.ModuleList(layers), model, moe, groups, RATE)
    assert all((layer.router.bias > 0).sum() == EXPERTS - 1 for layer in layers)
    return load.layers, load.chosen_LE.tolist(), load.auxiliary_loss_L.tolist()


def test_blocks_of_mtp_are_layers_behind_the_last():
    expected = (
        (1, 3, 4, 5),
        [[2 * index if expert == index else 0 for expert in range(EXPERTS)] for index in (1, 3, 4, 5)],
        [1.0, 3.0, 4.0, 5.0],
    )
    assert run_ranks(finish_a_step, 2, parallel={"pipeline_model_parallel_size": 2}) == [expected] * 2
