"""The feed-forward block with experts: route, limit, exchange, combine; and what a step leaves behind for balancing.

Every part is its own file: ``router.py`` chooses, ``balance.py`` measures the load and acts on it, ``dispatch.py``
takes tokens to their experts and back, ``experts.py`` computes. After the optimizer step ``finish_step`` adds up what
all layers and ranks counted, in one collective, and updates the balance of every layer by the same numbers everywhere.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.context import Context
from megatron_ds.model.mlp import MLP
from megatron_ds.model.moe.balance import Balance, attach_loss, update_bias
from megatron_ds.model.moe.dispatch import build_dispatcher
from megatron_ds.model.moe.experts import Experts
from megatron_ds.model.moe.router import Router
from megatron_ds.parallel.random import derive_seed
from megatron_ds.parallel.shard import Shard

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


class SparseMLP(nn.Module):
    """x_BSD -> x_BSD: the weighted outputs of each token's experts, plus a shared expert that all tokens pass."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, index: int, groups: "Groups | None"):
        """``index``: of the decoder layer; ``groups``: ranks that share the experts, None for all of them here."""
        nn.Module.__init__(self)  # not super(): layer.py puts a DeepSpeed class, whose __init__ builds a layer, next
        self.index, self.moe = index, moe
        self.router = Router(model.hidden_size, moe)
        self.balance = Balance(moe)
        ranks = groups.topology.expert if groups else 1
        width = moe.moe_ffn_hidden_size or model.ffn_size
        self.experts = Experts(moe.num_experts // ranks, model.hidden_size, width, moe.experts)
        if ranks > 1:
            for parameter in self.experts.parameters():
                Shard("expert", 0, groups.index("expert"), ranks).attach(parameter)
        shared = moe.moe_shared_expert_intermediate_size
        self.shared = MLP(model.hidden_size, shared) if shared else None
        self.dispatcher = build_dispatcher(moe, groups.experts if groups else None, moe.num_experts)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, self._jitter_seed(context))
        weight_TK, expert_TK = routing.weight_TK, routing.expert_TK
        if self.training:
            weight_TK, expert_TK = self.balance.limit(routing)
            self.balance.record(context.micro_batch, routing.expert_TK, expert_TK)
        y_TD = self.dispatcher(x_TD, weight_TK, expert_TK, self.experts)
        y_BSD = y_TD.view_as(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        loss = self.balance.auxiliary_loss(routing, len(x_BSD)) if self.training else None
        if loss is None:
            return y_BSD
        self.balance.record_loss(context.micro_batch, loss)
        return attach_loss(y_BSD, loss, context.auxiliary_scale)

    def _jitter_seed(self, context: Context) -> int | None:
        if not self.training or self.moe.moe_input_jitter_eps == 0:
            return None
        assert context.dropout_seed is not None, "router noise needs a dropout_seed"
        return derive_seed(context.dropout_seed, "router", self.index)


@dataclass(frozen=True)
class ExpertLoad:
    """What the experts did in one optimizer step, summed over all ranks; the same on every rank, on the CPU."""

    layers: tuple[int, ...]
    """Decoder layers that have experts: the L of the tensors."""
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


def finish_step(module: nn.Module, moe: MoEConfig, num_layers: int, groups: "Groups") -> ExpertLoad:
    """Add up the step's counts over all layers and ranks and let every layer act on them.

    Args:
        module: the layers of this rank; ``num_layers`` is the depth of the whole model.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SparseMLP)]
    sparse = [index for index in range(num_layers) if moe.is_moe_layer(index)]
    experts = moe.num_experts
    # Counts and fp32 biases are exact in float64, so every rank gets the same bits whatever the order of the sum.
    table_LC = torch.zeros(len(sparse), 3 * experts + 4, dtype=torch.float64, device=groups.device)
    for layer in layers:
        traffic = layer.dispatcher.traffic
        row_C = table_LC[sparse.index(layer.index)]
        row_C[: 2 * experts] = layer.balance.take_counts().flatten()
        if layer.router.bias is not None and groups.index("data") == 0:
            row_C[2 * experts : 3 * experts] = layer.router.bias
        measured = (traffic.bytes_sent, traffic.seconds, traffic.exposed_seconds, layer.balance.take_loss())
        row_C[3 * experts :] = row_C.new_tensor(measured)
        traffic.reset()
    groups.sum_over_world(table_LC)
    chosen_LE, dropped_LE, bias_LE, measured_L4 = table_LC.split([experts, experts, experts, 4], dim=1)
    for layer in layers:
        row = sparse.index(layer.index)
        layer.balance.update(chosen_LE[row])
        if layer.router.bias is not None:
            update_bias(layer.router.bias, layer.balance.load_factor, moe.moe_router_bias_update_rate)
    ranks = groups.topology.data
    return ExpertLoad(
        layers=tuple(sparse),
        chosen_LE=chosen_LE.long().cpu(),
        dropped_LE=dropped_LE.long().cpu(),
        bias_LE=bias_LE.float().cpu() if moe.router.fine != "none" else None,
        ranks=groups.topology.expert,
        bytes_sent_L=measured_L4[:, 0].cpu(),
        seconds_L=measured_L4[:, 1].cpu() / ranks,
        exposed_seconds_L=measured_L4[:, 2].cpu() / ranks,
        auxiliary_loss_L=measured_L4[:, 3].cpu() / ranks,
    )
