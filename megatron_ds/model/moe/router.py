"""Progressive routing: score every expert, narrow the choice down, choose, weigh.

    scores   s = softmax or sigmoid of the logits, over all experts, in fp32
    coarse   which experts stay candidates: all of them, or those of the groups that are best by s + bias
    fine     which K candidates are chosen: those best by s + bias, or by s' + bias with refined scores s'
    weights  s (s') of the chosen, without the bias; normalised and scaled

``Router.forward`` is these four steps. The bias only selects, so it has no gradient: ``balance.py`` moves it. No stage
looks at another token, and of equal scores the lower index wins.

Without the learned refine stage this is the router of stock models: with softmax mixtral's, qwen3_moe's and
ernie4_5_moe's (bias), deepseek_v2's (groups); with sigmoid deepseek_v3's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.moe_schema import Router as RouterConfig
from megatron_ds.parallel.tensor import TensorRanks


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a micro-batch go. Column k of a token is its k-th best expert."""

    weight_TK: Tensor
    """fp32, differentiable: factors on the outputs of the chosen experts."""
    expert_TK: Tensor
    """int64: the chosen experts, distinct for a token."""
    probability_TE: Tensor
    """fp32, differentiable: the scores of all experts, normalised to sum 1; for the auxiliary losses."""
    logit_TE: Tensor
    """fp32, differentiable: what the scores were made of."""


@dataclass(frozen=True)
class Scoring:
    """What sets the kinds of router apart; all functions work on the last axis."""

    score: Callable[[Tensor], Tensor]
    """Logits to scores of the same shape."""
    group_score: Callable[[Tensor], Tensor]
    """[T, groups, experts of a group] to [T, groups]."""
    probability: Callable[[Tensor], Tensor]
    """Scores of all experts to values that sum to 1."""
    normalise: Callable[[Tensor], Tensor]
    """Some of the scores over their sum, guarded as in stock models."""


def _over_sum(score: Tensor) -> Tensor:
    return score / (score.sum(dim=-1, keepdim=True) + 1e-20)


SCORING: dict[str, Scoring] = {
    "softmax": Scoring(
        score=lambda logit: logit.softmax(dim=-1),
        group_score=lambda score: score.amax(dim=-1),
        probability=lambda score: score,
        normalise=lambda score: score / score.sum(dim=-1, keepdim=True).clamp_min(1e-12),
    ),
    "sigmoid": Scoring(
        score=torch.sigmoid,
        group_score=lambda score: score.topk(2, dim=-1).values.sum(dim=-1),
        probability=_over_sum,
        normalise=_over_sum,
    ),
}


class Fp32Buffers(nn.Module):
    """A module whose buffers follow it to other devices but stay fp32 when it is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = before[name].to(moved.device)  # casting back would not bring back the bits
        return self


class Router(Fp32Buffers):
    """Chooses ``moe_router_topk`` experts for every token.

    Attributes:
        weight: parameter [E, D].
        bias: fp32 buffer [E], zero at first; None when ``router.fine`` is "none".
        refine: parameter [E, D]; None unless ``router.fine`` is "refine".
    """

    def __init__(self, hidden_size: int, moe: MoEConfig):
        super().__init__()
        config: RouterConfig = moe.router
        self.config, self.topk = config, moe.moe_router_topk
        self.scoring = SCORING[config.kind]
        self.num_candidates = config.refine_candidates or 2 * moe.moe_router_topk
        refined, biased = config.fine == "refine", config.fine != "none"
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.refine = nn.Parameter(torch.empty(moe.num_experts, hidden_size)) if refined else None
        self.register_buffer("bias", torch.zeros(moe.num_experts, dtype=torch.float32) if biased else None)

    def forward(self, x_TD: Tensor, noise_TD: Tensor | None = None) -> Routing:
        """Route tokens of any floating type; ``noise_TD``: what they are multiplied by first, see ``jitter``."""
        x_TD = x_TD.float() if noise_TD is None else x_TD.float() * noise_TD
        logit_TE = F.linear(x_TD, self.weight.float())
        score_TE = self.scoring.score(logit_TE)
        candidate_TE = self._coarse(self._biased(score_TE))
        score_TK, expert_TK = self._fine(x_TD, logit_TE, score_TE, candidate_TE)
        weight_TK = self.scoring.normalise(score_TK) if self.config.norm_topk_prob else score_TK
        return Routing(
            weight_TK=weight_TK * self.config.scaling_factor,
            expert_TK=expert_TK,
            probability_TE=self.scoring.probability(score_TE),
            logit_TE=logit_TE,
        )

    def _biased(self, score: Tensor, expert: Tensor | slice = slice(None)) -> Tensor:
        """What selects, without a gradient: scores, plus the bias of the experts they are of."""
        return score.detach() if self.bias is None else score.detach() + self.bias[expert]

    def _coarse(self, choice_TE: Tensor) -> Tensor:
        """The selection scores, -inf where an expert is not in one of the ``group_topk`` best groups."""
        if self.config.num_groups is None:
            return choice_TE
        choice_TGE = choice_TE.unflatten(1, (self.config.num_groups, -1))
        group_TG = best(self.scoring.group_score(choice_TGE), self.config.group_topk)
        left_out_TG = choice_TE.new_ones(choice_TGE.shape[:2], dtype=torch.bool).scatter_(1, group_TG, False)
        return choice_TGE.masked_fill(left_out_TG[..., None], float("-inf")).flatten(1)

    def _fine(self, x_TD: Tensor, logit_TE: Tensor, score_TE: Tensor, candidate_TE: Tensor) -> tuple[Tensor, Tensor]:
        """score_TK (differentiable, unbiased) and expert_TK of the chosen."""
        if self.refine is None:
            expert_TK = best(candidate_TE, self.topk)
            return score_TE.gather(1, expert_TK), expert_TK
        expert_TC = best(candidate_TE, self.num_candidates)
        refined_TE = logit_TE + F.linear(x_TD, self.refine.float())
        score_TC = self.scoring.score(refined_TE.gather(1, expert_TC))
        chosen_TK = best(self._biased(score_TC, expert_TC), self.topk)
        return score_TC.gather(1, chosen_TK), expert_TC.gather(1, chosen_TK)


def jitter(x_BSD: Tensor, epsilon: float, seed: int, ranks: TensorRanks) -> Tensor:
    """Noise for the router's input: fp32, uniform in [1 - epsilon, 1 + epsilon], [B, S, D].

    Args:
        x_BSD: the tokens it is for.
        epsilon: width of the noise.
        seed: identifies micro-batch and layer.
        ranks: share the sequence; each takes its stretch of the noise that one process would draw.
    """
    generator = torch.Generator(x_BSD.device).manual_seed(seed)
    batch, stretch, width = x_BSD.shape
    noise_BSD = x_BSD.new_empty(batch, ranks.size * stretch, width, dtype=torch.float32)
    return ranks.stretch(noise_BSD.uniform_(1 - epsilon, 1 + epsilon, generator=generator))


def best(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest along the last axis, best first; of equal ones the lower index.

    ``topk`` promises no order of equal values, and it differs between devices and sizes.
    """
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]
