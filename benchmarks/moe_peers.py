"""The MoE layers that the exchange is compared with: DeepSpeed's two and Megatron-core's, on gloo and fp32.

Each function builds one layer around a ``Problem``: tokens, router and expert weights that are the same for all. What
makes them run on a CPU changes no exchange:

- ``deepspeed.moe``: nothing to change.
- DeepSpeed AutoEP: its SwiGLU is a Triton kernel; the plain form of the same function, which AutoEP has too, takes its
  place. Experts run with ``use_grouped_mm``.
- Megatron-core's alltoall dispatcher: stand-ins for the CUDA streams and the current device that it names. Its own
  grouped experts need a CUDA extension, so its rows go through the grouped products that our layer uses as well.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and how uneven its routing is."""

    tokens: int
    """Per rank."""
    hidden: int
    ffn: int
    experts: int
    top_k: int
    skew: float
    """Standard deviation of an expert's logit over all tokens; the logits of one expert differ by Gumbel noise."""


@dataclass(frozen=True)
class Problem:
    """One rank's tokens, the router, and the weights of its experts; the same for every layer."""

    shape: Shape
    x_TD: Tensor
    grad_TD: Tensor
    """Gradient of the loss by the layer's output."""
    router_ED: Tensor
    gate_up: Tensor
    """[local E, 2F, D]: F rows of gate, then F rows of up."""
    down: Tensor
    """[local E, D, F]"""

    @property
    def local_experts(self) -> int:
        return self.gate_up.shape[0]


def make_problem(shape: Shape, rank: int, ranks: int) -> Problem:
    """The same routing and weights on every run; the router reads its logits off the first features of a token."""
    D, E, F_ = shape.hidden, shape.experts, shape.ffn
    generator = torch.Generator().manual_seed(0)
    popularity_E = shape.skew * torch.randn(E, generator=generator)
    own = torch.Generator().manual_seed(1000 + rank)
    x_TD, grad_TD = torch.randn(2, shape.tokens, D, generator=own)
    gumbel_TE = -torch.log(torch.empty(shape.tokens, E).exponential_(generator=own))
    x_TD[:, :E] = popularity_E + gumbel_TE
    gate_up, down = [], []
    for expert in range(rank * E // ranks, (rank + 1) * E // ranks):
        generator.manual_seed(2000 + expert)
        gate_up.append(torch.randn(2 * F_, D, generator=generator) / D**0.5)
        down.append(torch.randn(D, F_, generator=generator) / F_**0.5)
    return Problem(shape, x_TD, grad_TD, torch.eye(E, D), torch.stack(gate_up), torch.stack(down))


@dataclass(frozen=True)
class Layer:
    """A layer made from a problem."""

    forward: Callable[[Tensor], Tensor]
    """x_TD -> y_TD, differentiable; collective over the ranks."""
    parameters: list[nn.Parameter]


def route(problem: Problem, router_ED: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """weight_TK and expert_TK: softmax, top-k, weights renormalised, as all the routers here do."""
    score_TE = F.linear(x_TD, router_ED).softmax(dim=-1)
    weight_TK, expert_TK = score_TE.topk(problem.shape.top_k)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), expert_TK


def deepspeed_moe(problem: Problem, capacity_factor: float | None) -> Layer:
    """``deepspeed.moe.layer.MoE``, with a capacity or (None) padded to the fullest expert, so that nothing drops."""
    from deepspeed.moe.layer import MoE

    shape = problem.shape
    layer = MoE(
        shape.hidden, SwiGLU(shape.hidden, shape.ffn), shape.experts, ep_size=dist.get_world_size(), k=shape.top_k,
        capacity_factor=capacity_factor or 1.0, drop_tokens=capacity_factor is not None, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(problem.router_ED)
        for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(problem.gate_up[index])
            expert.down.weight.copy_(problem.down[index])
    return Layer(lambda x_TD: layer(x_TD)[0], list(layer.parameters()))


class SwiGLU(nn.Module):
    """One expert for ``deepspeed.moe``, which takes any module."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def auto_ep(problem: Problem) -> Layer:
    """DeepSpeed's ``AutoEPMoELayer``, made from a block with fused weights as transformers has them."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS

    EXPERT_ACTIVATIONS["swiglu"] = dataclasses.replace(EXPERT_ACTIVATIONS["swiglu"], fused_fn=None)
    shape, ranks = problem.shape, dist.get_world_size()
    block = nn.Module()
    block.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
    block.gate.weight.data.copy_(problem.router_ED)
    block.experts = nn.Module()
    # The layer cuts out its own experts of all of them; those of the other ranks are never read.
    for name, local in (("gate_up_proj", problem.gate_up), ("down_proj", problem.down)):
        setattr(block.experts, name, nn.Parameter(local.repeat(ranks, 1, 1)))
    spec = MoELayerSpec(
        moe_module_name="mlp", model_family="mixtral", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
        num_experts=shape.experts, top_k=shape.top_k, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn,
        score_func="softmax", score_apply="post", route_norm=True, gate_bias=False, return_router_logits=False,
        router_logits_capture_target="none", router_logits_capture_index=None, router_logits_capture_layer_name=None,
        has_shared_experts=False, shared_experts_name="",
    )  # fmt: skip
    config = AutoEPConfig(enabled=True, autoep_size=ranks, use_grouped_mm=True)
    layer = AutoEPMoELayer(spec, block, ranks, dist.get_rank(), config)
    layer.set_deepspeed_parallelism()
    return Layer(lambda x_TD: layer(x_TD[None])[0], list(layer.parameters()))


def megatron_core(problem: Problem) -> Layer:
    """Megatron-core's ``MoEAlltoAllTokenDispatcher`` between our router and our grouped products."""
    with cuda_stand_ins():
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
        from megatron.core.transformer.transformer_config import TransformerConfig

        shape, ranks = problem.shape, dist.get_world_size()
        config = TransformerConfig(
            num_layers=1, hidden_size=shape.hidden, num_attention_heads=8, num_moe_experts=shape.experts,
            moe_router_topk=shape.top_k, moe_token_dispatcher_type="alltoall", expert_model_parallel_size=ranks,
        )  # fmt: skip
        alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]
        groups = ProcessGroupCollection(ep=dist.group.WORLD, tp_ep=dist.group.WORLD, expt_tp=alone)
        first = dist.get_rank() * problem.local_experts
        owned = list(range(first, first + problem.local_experts))
        dispatcher = MoEAlltoAllTokenDispatcher(len(owned), owned, config, groups)
    router_ED = nn.Parameter(problem.router_ED)
    gate_up, down = nn.Parameter(problem.gate_up), nn.Parameter(problem.down)

    def forward(x_TD: Tensor) -> Tensor:
        weight_TK, expert_TK = route(problem, router_ED, x_TD)
        probability_TE = torch.zeros(len(x_TD), shape.experts).scatter(1, expert_TK, weight_TK)
        chosen_TE = torch.zeros(len(x_TD), shape.experts, dtype=torch.bool).scatter(1, expert_TK, True)
        tokens, weights = dispatcher.dispatch_preprocess(x_TD, chosen_TE, probability_TE)
        tokens, weights = dispatcher.token_dispatch(tokens, weights)
        rows_ND, count_E, weight_N = dispatcher.dispatch_postprocess(tokens, weights)
        end_E = count_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows_ND, gate_up.mT, offs=end_E).chunk(2, dim=-1)
        rows_ND = F.grouped_mm(F.silu(gate) * up * weight_N[:, None], down.mT, offs=end_E)
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows_ND)))

    return Layer(forward, [router_ED, gate_up, down])


class _Stream:
    """A CUDA stream or event on a machine where everything happens at once."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> "_Stream":
        return self


@contextlib.contextmanager
def cuda_stand_ins() -> Iterator[None]:
    """Let Megatron-core's dispatcher run on a CPU: its backward pass too has to run in here.

    Its split sizes stay tensors where there is no device to copy them from; gloo wants numbers.
    """
    real = dist.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **rest):
        splits = [s if s is None else [int(rows) for rows in s] for s in (output_split_sizes, input_split_sizes)]
        return real(output, input, *splits, **rest)

    device = {"Stream": _Stream, "Event": _Stream, "current_stream": _Stream, "current_device": lambda: "cpu"}
    device["stream"] = lambda _: contextlib.nullcontext()
    with mock.patch.multiple(torch.cuda, **device), mock.patch.object(dist, "all_to_all_single", all_to_all_single):
        yield


PEERS: dict[str, Callable[[Problem], Layer]] = {
    "deepspeed.moe": lambda problem: deepspeed_moe(problem, None),
    "deepspeed.moe cf 1.25": lambda problem: deepspeed_moe(problem, 1.25),
    "AutoEP": auto_ep,
    "megatron-core": megatron_core,
}
"""Name in the table -> how to build it; only the second drops tokens."""
