"""The feed-forward block with experts: route, limit, exchange, combine; and what a step leaves behind for balancing.

Every part is its own file: ``router.py`` chooses, ``balance.py`` measures the load and acts on it, ``dispatch.py``
takes tokens to their experts and back, ``experts.py`` computes. After the optimizer step ``finish_step`` adds up what
all layers and ranks counted, in one collective, and updates the balance of every layer by the same numbers everywhere.

Tensor-parallel ranks share this work in one of two ways: each has whole experts and its stretch of every sequence, or
all have the same tokens and each some columns of every expert. Either way a micro-batch is routed, limited and balanced
as in one process. The exchange between expert-parallel ranks does not notice: each tensor rank has a ring of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig, has_experts
from megatron_ds.model.context import Context
from megatron_ds.model.mlp import MLP
from megatron_ds.model.moe.balance import Balance, attach_loss, update_bias
from megatron_ds.model.moe.dispatch import build_dispatcher
from megatron_ds.model.moe.experts import Experts
from megatron_ds.model.moe.router import Router, jitter
from megatron_ds.parallel.random import derive_seed
from megatron_ds.parallel.shard import Shard
from megatron_ds.parallel.tensor import ALONE, mark_partial

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


class SparseMLP(nn.Module):
    """x_BSD -> x_BSD: the weighted outputs of each token's experts, plus a shared expert that all tokens pass.

    Attributes:
        tensor: the tensor-parallel ranks; they cut the shared expert in any case.
        cutting: those of them that share every expert and route the same tokens: all, or this one alone.
        spread: those that have whole experts and share the tokens: this one alone, or all.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, index: int, groups: "Groups | None"):
        """``index``: of the layer, MTP blocks counted on; ``groups``: ranks that share the work, None for none."""
        nn.Module.__init__(self)  # not super(): layer.py puts a DeepSpeed class, whose __init__ builds a layer, next
        self.index, self.moe = index, moe
        self.tensor = groups.tensor if groups else ALONE
        self.cutting = groups.expert_tensor if groups else ALONE
        self.spread = self.tensor if self.cutting.size == 1 else ALONE
        self.router = Router(model.hidden_size, moe)
        self.balance = Balance(moe, self.spread)
        self.experts = self._build_experts(model, moe, groups)
        shared = moe.moe_shared_expert_intermediate_size
        self.shared = MLP(model.hidden_size, shared, self.tensor) if shared else None
        self.dispatcher = build_dispatcher(moe, groups.experts if groups else None, moe.num_experts)
        if self.tensor.size > 1:
            mark_partial(self.router)

    def _build_experts(self, model: ModelConfig, moe: MoEConfig, groups: "Groups | None") -> Experts:
        """Those of this rank, tagged with how they are cut."""
        ranks = groups.topology.expert if groups else 1
        width = moe.moe_ffn_hidden_size or model.ffn_size
        experts = Experts(moe.num_experts // ranks, model.hidden_size, width, moe.experts, self.cutting)
        if ranks > 1:
            for parameter in experts.parameters():
                Shard("expert", 0, groups.index("expert"), ranks).attach(parameter)
        return mark_partial(experts) if self.spread.size > 1 else experts

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        y_BSD = self._leave(self._routed(self._enter(x_BSD), context))
        return y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)

    def _enter(self, x_BSD: Tensor) -> Tensor:
        """The tokens that this rank routes."""
        x_BSD = self.cutting.enter(x_BSD)
        return x_BSD if self.spread.splits_sequence else self.spread.split(x_BSD)

    def _leave(self, y_BSD: Tensor) -> Tensor:
        """The way back from ``_enter``."""
        y_BSD = self.cutting.leave(y_BSD)
        return y_BSD if self.spread.splits_sequence else self.spread.join(y_BSD)

    def _routed(self, x_BSD: Tensor, context: Context) -> Tensor:
        """Weighted sum of each token's experts, or this rank's term of it; the auxiliary losses are attached."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, self._noise(x_BSD, context))
        if not self.training:
            return self.dispatcher(x_TD, routing.weight_TK, routing.expert_TK, self.experts).view_as(x_BSD)
        weight_TK, expert_TK = self.balance.limit(routing, len(x_BSD))
        if self.cutting.index == 0:  # the others have the same tokens
            self.balance.record(context.micro_batch, routing.expert_TK, expert_TK)
        y_BSD = self.dispatcher(x_TD, weight_TK, expert_TK, self.experts).view_as(x_BSD)
        loss = self.balance.auxiliary_loss(routing, len(x_BSD))
        if loss is None:
            return y_BSD
        self.balance.record_loss(context.micro_batch, loss)
        # Ranks with the same tokens add up to one loss.
        return attach_loss(y_BSD, loss, context.auxiliary_scale / self.cutting.size)

    def _noise(self, x_BSD: Tensor, context: Context) -> Tensor | None:
        epsilon = self.moe.moe_input_jitter_eps
        if not self.training or epsilon == 0:
            return None
        assert context.dropout_seed is not None, "router noise needs a dropout_seed"
        seed = derive_seed(context.dropout_seed, "router", self.index)
        return jitter(x_BSD, epsilon, seed, self.spread).flatten(0, 1)


@dataclass(frozen=True)
class ExpertLoad:
    """What the experts did in one optimizer step, summed over all ranks; the same on every rank, on the CPU."""

    layers: tuple[int, ...]
    """Layers that have experts, the L of the tensors; MTP blocks count on from the decoder layers."""
    chosen_LE: Tensor
    """int64: assignments that the router made."""
    dropped_LE: Tensor
    """int64: those of them that found no slot."""
    bias_LE: Tensor | None
    """fp32: the biases that the routers selected with in this step; None without."""
    ranks: int
    """Expert-parallel ranks; rank r holds experts [r E / ranks, (r + 1) E / ranks)."""
    bytes_sent_L: Tensor
    """float64: payload that all ranks sent, forward and backward."""
    seconds_L: Tensor
    """float64: time from the first message to the last, mean over ranks."""
    exposed_seconds_L: Tensor
    """float64: the part of it that a rank spent waiting, mean over ranks."""
    auxiliary_loss_L: Tensor
    """float64: auxiliary losses times their coefficients, mean over micro-batches and ranks; 0 without any."""


def finish_step(
    module: nn.Module, model: ModelConfig, moe: MoEConfig, groups: "Groups", bias_rate: float
) -> ExpertLoad:
    """Add up the step's counts over all layers and ranks and let every layer act on them; collective over the world.

    Args:
        module: the layers of this rank.
        model: the whole model.
        moe: its experts.
        groups: this rank's place.
        bias_rate: step of the routers' biases, in units of the scores.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SparseMLP)]
    depth = model.num_layers + model.mtp_num_layers
    row_of = {index: row for row, index in enumerate(i for i in range(depth) if has_experts(model, moe, i))}
    experts = moe.num_experts
    # Counts and fp32 biases are exact in float64, so every rank gets the same bits whatever the order of the sum.
    table_LC = torch.zeros(len(row_of), 3 * experts + 4, dtype=torch.float64, device=groups.device)
    for layer in layers:
        _report(layer, table_LC[row_of[layer.index]], groups)
    groups.sum_over_world(table_LC)
    chosen_LE, dropped_LE, bias_LE, measured_L4 = table_LC.split([experts, experts, experts, 4], dim=1)
    for layer in layers:
        layer.balance.update(chosen_LE[row_of[layer.index]])
        if layer.router.bias is not None:
            update_bias(layer.router.bias, layer.balance.load_factor, bias_rate)
    ranks = groups.topology.data * groups.topology.tensor
    return ExpertLoad(
        layers=tuple(row_of),
        chosen_LE=chosen_LE.long().cpu(),
        dropped_LE=dropped_LE.long().cpu(),
        bias_LE=bias_LE.float().cpu() if moe.router.fine != "none" else None,
        ranks=groups.topology.expert,
        bytes_sent_L=measured_L4[:, 0].cpu(),
        seconds_L=measured_L4[:, 1].cpu() / ranks,
        exposed_seconds_L=measured_L4[:, 2].cpu() / ranks,
        auxiliary_loss_L=measured_L4[:, 3].cpu() / ranks,
    )


def _report(layer: SparseMLP, row_C: Tensor, groups: "Groups") -> None:
    """This rank's terms of a layer's row: chosen, dropped, bias (from the first rank only) and what was measured."""
    experts, traffic = layer.moe.num_experts, layer.dispatcher.traffic
    row_C[: 2 * experts] = layer.balance.take_counts().flatten()
    if layer.router.bias is not None and groups.index("data") == groups.index("tensor") == 0:
        row_C[2 * experts : 3 * experts] = layer.router.bias
    measured = (traffic.bytes_sent, traffic.seconds, traffic.exposed_seconds, layer.balance.take_loss())
    row_C[3 * experts :] = row_C.new_tensor(measured)
    traffic.reset()
