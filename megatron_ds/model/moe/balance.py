"""Balance of the experts: one number per expert, lambda = load / mean load, measured and put to use.

The load of an expert is how many assignments (token, expert) it got in one global batch: all ranks, all micro-batches
of a step. So lambda sums to the number of experts, and 1 is balance. It drives three things:

    auxiliary loss   adds to the training loss what unbalanced routing costs; see ``Balance.auxiliary_loss``
    bias update      bias += rate * sign(1 - lambda) after every step; see ``update_bias``
    capacity         a total of slots shared out in proportion to lambda; see ``Balance.limit``

``record`` counts while the micro-batches run; after the step the caller sums ``take_counts`` over all ranks and hands
the sum to ``update``. A micro-batch whose tokens tensor-parallel ranks have shared out is one all the same: losses and
capacity are those of the whole, and this is all that is communicated here. Only training calls any of this: evaluation
is dropless.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ds.config.moe_schema import Capacity, Dropless, DynamicCapacity, MoEConfig
from megatron_ds.model.moe.router import Fp32Buffers, Routing
from megatron_ds.parallel.tensor import ALONE, TensorRanks


class Balance(Fp32Buffers):
    """The balance of one layer.

    Attributes:
        load_factor: fp32 buffer [E], lambda of the last step; ones at first.
        share: fp32 buffer [E], the running mean of lambda; only with dynamic capacity.
    """

    def __init__(self, moe: MoEConfig, ranks: TensorRanks = ALONE):
        """``ranks``: those that share every micro-batch, each with its stretch of all sequences."""
        super().__init__()
        self.moe, self.ranks = moe, ranks
        self.register_buffer("load_factor", torch.ones(moe.num_experts, dtype=torch.float32))
        if isinstance(moe.capacity, DynamicCapacity):
            self.register_buffer("share", torch.ones(moe.num_experts, dtype=torch.float32))
        self._counts: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}

    def auxiliary_loss(self, routing: Routing, batch_size: int) -> Tensor | None:
        """Sum of the configured losses of one micro-batch: an fp32 scalar, or None without any.

        With P the mean probability of an expert, and f its assignments before dropping, relative to their mean:

        - switch: sum over the experts of f P (arXiv:2101.03961);
        - sequence: the same within each sequence, then the mean over sequences (arXiv:2412.19437);
        - global: lambda of the last step in place of f, so that the whole global batch counts;
        - z: mean square of the log-sum-exp of the logits (arXiv:2202.08906).

        The gradient goes through P and the logits; f and lambda are constants. Ranks that share the micro-batch have
        the same losses, and each the gradient of its own tokens.

        Args:
            routing: of the B * S tokens of the micro-batch, or this rank's part of them, sequence after sequence.
            batch_size: B.
        """
        moe = self.moe
        losses = (
            (moe.moe_aux_loss_coeff, lambda: self._imbalance(routing, 1)),
            (moe.moe_seq_aux_loss_coeff, lambda: self._imbalance(routing, batch_size)),
            (moe.moe_global_aux_loss_coeff, lambda: self.load_factor @ self._whole(routing.probability_TE.mean(dim=0))),
            (moe.moe_z_loss_coeff, lambda: self._whole(routing.logit_TE.logsumexp(dim=1).square().mean())),
        )
        terms = [coefficient * loss() for coefficient, loss in losses if coefficient > 0]
        return torch.stack(terms).sum() if terms else None

    def _imbalance(self, routing: Routing, parts: int) -> Tensor:
        """Sum over the experts of f P in each of equal parts of the tokens, then the mean over the parts."""
        chosen_TE = torch.zeros_like(routing.probability_TE).scatter_(1, routing.expert_TK, 1.0)
        means = [x.unflatten(0, (parts, -1)).mean(dim=1) for x in (chosen_TE, routing.probability_TE)]
        chosen_PE, probability_PE = self._whole(torch.stack(means))
        frequency_PE = chosen_PE * (chosen_TE.shape[1] / routing.expert_TK.shape[1])
        return (frequency_PE * probability_PE).sum(dim=1).mean()

    def _whole(self, mean: Tensor) -> Tensor:
        """Mean over the tokens of all ranks, from that over this one's."""
        return self.ranks.sum(mean) / self.ranks.size

    def limit(self, routing: Routing, batch_size: int) -> tuple[Tensor, Tensor]:
        """Drop the assignments of one micro-batch that find no slot; without a capacity, none.

        Each expert keeps as many as it has ``slots``: those of largest weight ("probs"; of equal weights the first
        tokens), or those of the first tokens ("position"). The weights that are kept stay as they are.

        Args:
            routing, batch_size: as for ``auxiliary_loss``.

        Returns:
            weight_TK, zero where dropped, and expert_TK, -1 where dropped.
        """
        if isinstance(self.moe.capacity, Dropless):
            return routing.weight_TK, routing.expert_TK
        weight_BSK, expert_BSK = (
            self.ranks.join(x.unflatten(0, (batch_size, -1))) for x in (routing.weight_TK.detach(), routing.expert_TK)
        )
        dropped_TK = self.ranks.stretch(self._overflow(weight_BSK, expert_BSK)).flatten(0, 1)
        return routing.weight_TK.masked_fill(dropped_TK, 0.0), routing.expert_TK.masked_fill(dropped_TK, -1)

    def _overflow(self, weight_BSK: Tensor, expert_BSK: Tensor) -> Tensor:
        """bool [B, S, K]: the assignments that find no slot, among those of a whole micro-batch."""
        expert_A = expert_BSK.flatten()
        priority_A = torch.arange(len(expert_A), device=expert_A.device)
        if self.moe.capacity.drop_policy == "probs":
            priority_A = weight_BSK.flatten().argsort(descending=True, stable=True)
        # The assignments expert by expert, each expert's own by priority: the place among these decides.
        queue_A = priority_A[expert_A[priority_A].argsort(stable=True)]
        count_E = expert_A.bincount(minlength=self.moe.num_experts)
        start_E = count_E.cumsum(0) - count_E
        place_A = torch.empty_like(queue_A).scatter_(0, queue_A, torch.arange(len(queue_A), device=queue_A.device))
        place_A -= start_E[expert_A]
        num_tokens = len(expert_A) // self.moe.moe_router_topk
        return (place_A >= self.slots(num_tokens)[expert_A]).view_as(expert_BSK)

    def slots(self, num_tokens: int) -> Tensor:
        """Slots of each expert, int64 [E], for a micro-batch of this many tokens.

        Fixed: ceil(factor * tokens * K / E) each. Dynamic: the same total, in proportion to the clamped ``share``.
        """
        capacity, experts = self.moe.capacity, self.moe.num_experts
        assert isinstance(capacity, Capacity), "a dropless layer has no slots"
        each = math.ceil(capacity.factor * num_tokens * self.moe.moe_router_topk / experts)
        if not isinstance(capacity, DynamicCapacity):
            return torch.full((experts,), each, dtype=torch.int64, device=self.load_factor.device)
        return apportion(each * experts, self.share.double().clamp(capacity.min_share, capacity.max_share))

    def record(self, micro_batch: int, chosen_TK: Tensor, kept_TK: Tensor) -> None:
        """Count the assignments of one micro-batch of this step.

        Args:
            micro_batch: its number within the step; a forward pass that runs again replaces what it counted.
            chosen_TK: experts that the router chose.
            kept_TK: the same after ``limit``, -1 where dropped.
        """
        experts = self.moe.num_experts
        chosen_E = chosen_TK.flatten().bincount(minlength=experts)
        kept_E = (kept_TK.flatten() + 1).bincount(minlength=experts + 1)[1:]
        self._counts[micro_batch] = torch.stack((chosen_E, chosen_E - kept_E))

    def take_counts(self) -> Tensor:
        """int64 [2, E]: assignments chosen and dropped since the last call, on this rank; they are forgotten."""
        total_2E = torch.zeros(2, self.moe.num_experts, dtype=torch.int64, device=self.load_factor.device)
        for count_2E in self._counts.values():
            total_2E += count_2E
        self._counts.clear()
        return total_2E

    def record_loss(self, micro_batch: int, loss: Tensor) -> None:
        """Keep the auxiliary loss of one micro-batch for the log; running again replaces it."""
        self._losses[micro_batch] = loss.detach()

    def take_loss(self) -> float:
        """Mean auxiliary loss of this rank's micro-batches since the last call, 0 without any; they are forgotten."""
        losses = [float(loss) for loss in self._losses.values()]
        self._losses.clear()
        return math.fsum(losses) / max(len(losses), 1)

    @torch.no_grad()
    def update(self, load_E: Tensor) -> None:
        """Take in the load of one step.

        Args:
            load_E: chosen assignments of every expert, summed over the whole global batch; the same on all ranks.
        """
        mean = load_E.double().mean()
        self.load_factor.copy_(torch.where(mean > 0, load_E / mean, 1.0))
        if isinstance(self.moe.capacity, DynamicCapacity):
            self.share.lerp_(self.load_factor, 1 - self.moe.capacity.smoothing)


def apportion(total: int, share_E: Tensor) -> Tensor:
    """Integers in proportion to ``share_E`` that sum to ``total``: rounded down, the rest to the largest remainders."""
    quota_E = share_E * (total / share_E.sum())
    whole_E = quota_E.floor()
    rank_E = (quota_E - whole_E).argsort(descending=True, stable=True).argsort()
    return (whole_E + (rank_E < total - whole_E.sum())).long()


def update_bias(bias_E: Tensor, load_factor_E: Tensor, rate: float) -> None:
    """Loss-free balancing, in place: bias += rate * sign(1 - lambda) (arXiv:2408.15664, algorithm 1)."""
    bias_E.add_((1 - load_factor_E).sign(), alpha=rate)


def attach_loss(y: Tensor, loss: Tensor, scale: float) -> Tensor:
    """y itself, whose backward pass also sends ``scale`` into the scalar ``loss``.

    So an auxiliary loss takes part in training without travelling to the end of the model.

    Args:
        y: an output that the training loss depends on.
        loss: scalar, in the graph.
        scale: loss scale / number of micro-batches, as the main loss is scaled.
    """
    return _AttachLoss.apply(y, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None
