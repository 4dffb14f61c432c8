"""How tokens reach their experts: the dispatchers that ``moe.dispatcher`` can name.

``local`` has all experts here. ``ring`` and ``hierarchical`` take tokens to other ranks while experts work
(``exchange.py``). ``all_to_all`` is the slow, plain reference: one blocking collective each way that carries a row for
every assignment, and autograd does the rest. All give the same results up to the order of summation, and each has a
fixed order, whatever arrives first (on CUDA under ``torch.use_deterministic_algorithms``: rows are summed by
``index_add_``).

A dispatcher is called with the router's choice and the rank's experts. An assignment to expert -1 is one that was
dropped: it goes nowhere and adds nothing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.exchange import Level, Stage
from megatron_ds.model.moe.experts import Assignment, Experts, PendingWeights
from megatron_ds.parallel.deferred import weight_gradients
from megatron_ds.parallel.ring import Ring, Traffic

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import ExpertGroups

WIRE_DTYPES = {"same": None, "bf16": torch.bfloat16}


class Dispatcher:
    """Applies the experts of all ranks to the tokens of this one."""

    def __init__(self, rings: tuple[Ring, ...], traffic: Traffic, wire_dtype: torch.dtype | None):
        """``rings``: those that a token takes, the outermost first; they count into ``traffic``."""
        self.traffic = traffic
        self._rings, self._wire_dtype = rings, wire_dtype

    def __call__(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: Experts) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            x_TD: this rank's tokens; ranks may have different numbers of them, also none.
            weight_TK: fp32 gate weights; differentiable.
            expert_TK: int64 experts, all of a token distinct; -1 is a dropped assignment.
            experts: those of this rank.

        Returns:
            y_TD; zero for a token without assignments.
        """
        raise NotImplementedError


class OverlappedDispatcher(Dispatcher):
    """Passes of our own through nested levels, one for each ring (``local``: none)."""

    def __call__(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: Experts) -> Tensor:
        stage: Stage = experts
        for ring in reversed(self._rings):
            stage = Level(ring, stage, self._wire_dtype)
        return _Exchange.apply(x_TD, weight_TK, experts.gate_up, experts.down, expert_TK, experts, stage, self.traffic)


class AllToAllDispatcher(Dispatcher):
    """A row per assignment, one collective each way, nothing at the same time as anything else.

    Autograd computes the weight gradients of the experts along with the rest, so they never wait (``deferred.py``).
    """

    def __call__(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: Experts) -> Tensor:
        (ring,) = self._rings
        order_A, counts = _sorted_by_expert(expert_TK, ring.size * experts.num_experts)
        row_A, weight_A = order_A // expert_TK.shape[1], weight_TK.flatten()[order_A]
        sent_PE = torch.tensor(counts, device=x_TD.device).view(ring.size, experts.num_experts)
        with self.traffic.exchange():
            received_PE = ring.exchange_counts(sent_PE)
        sent, received = (count_PE.sum(1).tolist() for count_PE in (sent_PE, received_PE))

        arrived_AD = _AllToAll.apply(x_TD[row_A], sent, received, ring, self._wire_dtype)
        expert_A = torch.arange(received_PE.numel(), device=x_TD.device) % experts.num_experts
        by_expert_A = expert_A.repeat_interleave(received_PE.flatten()).argsort(stable=True)
        y_AD = experts.compute(arrived_AD[by_expert_A], received_PE.sum(0).tolist())
        y_AD = _AllToAll.apply(y_AD[by_expert_A.argsort()], received, sent, ring, self._wire_dtype)
        y_TD = torch.zeros_like(x_TD, dtype=weight_TK.dtype).index_add(0, row_A, y_AD * weight_A[:, None])
        return y_TD.to(x_TD.dtype)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; its adjoint brings gradients back."""

    @staticmethod
    def forward(
        ctx, x_AD: Tensor, sent: list[int], received: list[int], ring: Ring, wire_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.splits, ctx.ring, ctx.wire_dtype = (received, sent), ring, wire_dtype
        with ring.traffic.exchange():
            return ring.all_to_all(x_AD.to(wire_dtype or x_AD.dtype), sent, received).to(x_AD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.ring.traffic.exchange():
            wire_AD = ctx.ring.all_to_all(grad_AD.to(ctx.wire_dtype or grad_AD.dtype), *ctx.splits)
        return wire_AD.to(grad_AD.dtype), None, None, None, None


class _Exchange(torch.autograd.Function):
    """The whole layer as one node: the backward pass overlaps as the forward pass does."""

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, expert_TK: Tensor,
        experts: Experts, stage: Stage, traffic: Traffic,
    ) -> Tensor:  # fmt: skip
        order_A, counts = _sorted_by_expert(expert_TK, stage.num_experts)
        weight_A = weight_TK.flatten().index_select(0, order_A).float()
        with traffic.exchange():
            y_TD, saved = stage.forward(x_TD, Assignment(order_A // expert_TK.shape[1], weight_A, counts))
        ctx.experts, ctx.stage, ctx.traffic, ctx.weight = experts, stage, traffic, (weight_TK.shape, weight_TK.dtype)
        # As saved tensors they are released by activation recomputation; as attributes they would not be.
        leaves, ctx.structure = tree_flatten((order_A, saved))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        leaves = [next(tensors) if leaf is None else leaf for leaf in ctx.others]
        order_A, saved = tree_unflatten(leaves, ctx.structure)
        experts: Experts = ctx.experts
        pending: list[PendingWeights] = []
        grad_experts: list[Tensor | None] = [None, None]

        def compute() -> tuple[Tensor, Tensor]:
            gradients = experts.weight_gradients(pending)
            pending.clear()  # this function may be kept for a while after it has run
            return gradients

        def meanwhile() -> None:
            if any(ctx.needs_input_grad[2:4]):
                grad_experts[:] = weight_gradients([experts.gate_up, experts.down], compute)

        with ctx.traffic.exchange():
            grad_x_TD, grad_weight_A = ctx.stage.backward(saved, grad_y_TD.contiguous(), pending, meanwhile)
        shape, dtype = ctx.weight
        grad_weight_TK = grad_weight_A.new_zeros(shape.numel()).index_copy_(0, order_A, grad_weight_A)
        return grad_x_TD, grad_weight_TK.view(shape).to(dtype), *grad_experts, None, None, None, None


def _sorted_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Places in the flattened choice, sorted by expert, then by token, without those dropped; and counts by expert."""
    expert_A = expert_TK.flatten()
    dropped, *counts = torch.bincount(expert_A + 1, minlength=num_experts + 1).tolist()
    return expert_A.argsort(stable=True)[dropped:], counts


def _local(groups: "ExpertGroups | None", wire_dtype: torch.dtype | None) -> Dispatcher:
    return OverlappedDispatcher((), Traffic(), wire_dtype)


def _all_to_all(groups: "ExpertGroups", wire_dtype: torch.dtype | None) -> Dispatcher:
    traffic = Traffic()
    return AllToAllDispatcher((_flat(groups, traffic),), traffic, wire_dtype)


def _ring(groups: "ExpertGroups", wire_dtype: torch.dtype | None) -> Dispatcher:
    traffic = Traffic()
    return OverlappedDispatcher((_flat(groups, traffic),), traffic, wire_dtype)


def _hierarchical(groups: "ExpertGroups", wire_dtype: torch.dtype | None) -> Dispatcher:
    if groups.rails is None or groups.node is None:  # one node, or one rank per node
        return _ring(groups, wire_dtype)
    traffic = Traffic()
    rings = (groups.rails.counting(traffic, ranks_per_node=1), groups.node.counting(traffic))
    return OverlappedDispatcher(rings, traffic, wire_dtype)


def _flat(groups: "ExpertGroups", traffic: Traffic) -> Ring:
    return groups.flat.counting(traffic, groups.node.size if groups.node else None)


DISPATCHERS: dict[str, Callable[["ExpertGroups", torch.dtype | None], Dispatcher]] = {
    "local": _local,
    "all_to_all": _all_to_all,
    "ring": _ring,
    "hierarchical": _hierarchical,
}
"""Keys are the values of ``moe.dispatcher``."""


def build_dispatcher(moe: MoEConfig, groups: "ExpertGroups | None", num_experts: int) -> Dispatcher:
    """The dispatcher that ``moe`` names; without ``groups`` every rank has all experts and nothing is exchanged."""
    ranks = groups.flat.size if groups else 1
    assert num_experts % ranks == 0, f"{num_experts} experts on {ranks} ranks"
    return DISPATCHERS[moe.dispatcher if groups else "local"](groups, WIRE_DTYPES[moe.wire_dtype])
