"""Attention over the tiles of ``attention_mask``: it computes the visible keys and little else.

For every tile of queries: scores by one matrix product, the two end masks, softmax, a second product. The backward
pass makes the probabilities again, so only q, k and v are kept and no S x S tensor exists. A window W costs O(S * W),
packed documents the sum of their squares, and a document never touches another's numbers. The library's kernel for a
CPU computes what a mask hides; where nothing is hidden, the two are equally fast. Everything inside is fp32, whatever
the inputs are.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ds.model.attention_mask import Packing, Tile

CACHED_SCORES = 2**19
"""Scores of a tile that are handled at a time: two megabytes."""


@dataclass(frozen=True)
class Dropout:
    """Dropout on attention probabilities, its mask made again in the backward pass."""

    probability: float
    seed: int


def tiled_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    packing: Packing,
    *,
    window: int | None = None,
    log_gate_BHS: Tensor | None = None,
    gate_window: int | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T + bias) v over the visible keys.

    Args:
        q_BHSK, k_BGSK, v_BGSK: queries, keys and values; each of the G key heads serves H / G query heads in turn.
            Values may have another width than queries and keys.
        packing: the documents of the samples.
        window: largest visible distance, None for all of the document.
        log_gate_BHS: fp32, added to the scores of keys at a distance above ``gate_window``.
        scale: factor on the scores, by default 1 / sqrt(K).
        dropout: dropout on the probabilities, or None.
        with_lse: also return the log-sum-exp of the scores; it carries a gradient.

    Returns:
        out_BHSK in the dtype of q and the width of v (a transposed view of out_BSHK, which the output projection reads
        without a copy) and, if asked for, lse_BHS in fp32.
    """
    tiles = packing.tiles(window, gate_window)
    scale = q_BHSK.shape[-1] ** -0.5 if scale is None else scale
    return _TiledAttention.apply(q_BHSK, k_BGSK, v_BGSK, log_gate_BHS, tiles, scale, dropout, with_lse)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS, tiles, scale, dropout, with_lse):
        ctx.save_for_backward(q_BHSK, k_BGSK, v_BGSK, log_gate_BHS)
        ctx.tiles, ctx.scale, ctx.dropout = tiles, scale, dropout
        batch, heads, length, _ = q_BHSK.shape
        out_BHSK = q_BHSK.new_empty(batch, length, heads, v_BGSK.shape[-1]).transpose(1, 2)
        lse_BHS = q_BHSK.new_empty(batch, heads, length, dtype=torch.float32) if with_lse else None
        keep_masks = _keep_masks(dropout, q_BHSK.device)
        for part in _parts(tiles, scale, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS):
            for tile in part.tiles:
                score_NML = part.scores(tile, part.queries(tile))
                highest_NM = score_NML.amax(-1) if with_lse else None
                p_NML = torch.softmax(score_NML, -1, out=score_NML)
                if with_lse:  # a query's largest probability is exp(highest - lse)
                    part.put(lse_BHS, tile, highest_NM - p_NML.amax(-1).log_())
                if dropout:
                    p_NML.mul_(keep_masks(p_NML))
                part.put(out_BHSK, tile, torch.bmm(p_NML, part.v_NSK[:, tile.keys]))
        return out_BHSK, lse_BHS

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_BHSK, grad_lse_BHS):
        q_BHSK, k_BGSK, v_BGSK, log_gate_BHS = ctx.saved_tensors
        grad_q_BHSK, grad_k_BGSK, grad_v_BGSK = (torch.empty_like(x) for x in (q_BHSK, k_BGSK, v_BGSK))
        grad_gate_BHS = None if log_gate_BHS is None else torch.zeros_like(log_gate_BHS)
        keep_masks = _keep_masks(ctx.dropout, q_BHSK.device)
        for part in _parts(ctx.tiles, ctx.scale, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS):
            grad_k_NSK, grad_v_NSK = torch.zeros_like(part.k_NSK), torch.zeros_like(part.v_NSK)
            for tile in part.tiles:
                q_NMK, grad_NMK = part.queries(tile), part.take(grad_out_BHSK, tile).float()
                score_NML = part.scores(tile, q_NMK)
                p_NML = torch.softmax(score_NML, -1, out=score_NML)
                grad_p_NML = part.scratch(tile, 1)
                torch.bmm(grad_NMK, part.v_NSK[:, tile.keys].transpose(1, 2), out=grad_p_NML)
                kept_NML = p_NML
                if ctx.dropout:
                    keep_NML = keep_masks(p_NML)
                    kept_NML = p_NML * keep_NML
                    grad_p_NML.mul_(keep_NML)
                _add_product(grad_v_NSK[:, tile.keys], kept_NML, grad_NMK)
                grad_score_NML = torch._softmax_backward_data(
                    grad_p_NML, p_NML, -1, torch.float32, grad_input=grad_p_NML
                )
                if grad_lse_BHS is not None:  # d lse / d score is the probability
                    grad_score_NML.addcmul_(p_NML, part.take(grad_lse_BHS, tile).unsqueeze(-1))
                if tile.far is not None:
                    part.put(grad_gate_BHS, tile, part.far_sum(tile, grad_score_NML))
                _add_product(grad_k_NSK[:, tile.keys], grad_score_NML, q_NMK)
                grad_q_NMK = torch.bmm(grad_score_NML, part.k_NSK[:, tile.keys]).mul_(part.scale)
                part.put(grad_q_BHSK, tile, grad_q_NMK)
            part.put_keys(grad_k_BGSK, grad_k_NSK)
            part.put_keys(grad_v_BGSK, grad_v_NSK)
        return grad_q_BHSK, grad_k_BGSK, grad_v_BGSK, grad_gate_BHS, None, None, None, None


class _Part:
    """Some rows and key heads of the batch, in fp32 and in the layout of the products.

    Shape letters: N rows x key heads, R query heads per key head, Q queries and L keys of a tile, M = R * Q.
    """

    def __init__(self, rows: slice, groups: slice, tiles: list[Tile], scale, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS):
        self.rows, self.groups, self.tiles = rows, groups, tiles
        self.q_BHSK, self.log_gate_BHS = q_BHSK, log_gate_BHS
        self.scale, self.repeats = scale, q_BHSK.shape[1] // k_BGSK.shape[1]
        self.k_NSK, self.v_NSK = (x[rows, groups].flatten(0, 1).float().contiguous() for x in (k_BGSK, v_BGSK))
        self.num_heads = self.k_NSK.shape[0]
        self._scratch = self.k_NSK.new_empty(2, self.num_heads * self.repeats * _largest(tiles))

    def scratch(self, tile: Tile, slot: int) -> Tensor:
        """Memory for one of the two score-sized tensors of a tile, used again by the next tile: [N, M, L]."""
        shape = self.num_heads, self.repeats * (tile.end - tile.begin), tile.end - tile.first_key
        return self._scratch[slot, : math.prod(shape)].view(shape)

    def take(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's queries of x, [B, H, S] or [B, H, S, K], as [N, M] or [N, M, K]."""
        return self._of(x, tile).reshape(self.num_heads, -1, *x.shape[3:])

    def put(self, x: Tensor, tile: Tile, value: Tensor) -> None:
        """Write what ``take`` would read."""
        target = self._of(x, tile)
        target.copy_(value.view(target.shape))

    def put_keys(self, x_BGSK: Tensor, value_NSK: Tensor) -> None:
        """Write what ``k_NSK`` was read from, in another tensor."""
        target = x_BGSK[self.rows, self.groups]
        target.copy_(value_NSK.view(target.shape))

    def _of(self, x: Tensor, tile: Tile) -> Tensor:
        return x.unflatten(1, (-1, self.repeats))[self.rows, self.groups, :, tile.begin : tile.end]

    def queries(self, tile: Tile) -> Tensor:
        """q_NMK, scaled."""
        return (self._of(self.q_BHSK, tile).float() * self.scale).reshape(self.num_heads, -1, self.q_BHSK.shape[-1])

    def scores(self, tile: Tile, q_NMK: Tensor) -> Tensor:
        """Masked and gated scores, in the first scratch memory."""
        score_NML = torch.bmm(q_NMK, self.k_NSK[:, tile.keys].transpose(1, 2), out=self.scratch(tile, 0))
        score_NRQL = score_NML.unflatten(1, (self.repeats, -1))
        score_NRQL[..., tile.begin - tile.end :] += tile.causal
        if tile.edge is not None:
            score_NRQL[..., : tile.edge.shape[-1]] += tile.edge
        if tile.far is not None:
            log_gate_NRQ1 = self.take(self.log_gate_BHS, tile).view(*score_NRQL.shape[:-1], 1)
            score_NRQL[..., : tile.far.shape[-1]].addcmul_(log_gate_NRQ1, tile.far)
        return score_NML

    def far_sum(self, tile: Tile, score_NML: Tensor) -> Tensor:
        """Sum over the far keys, [N, R, Q]."""
        return (score_NML.unflatten(1, (self.repeats, -1))[..., : tile.far.shape[-1]] * tile.far).sum(-1)


def _parts(tiles, scale, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS) -> Iterator[_Part]:
    """Cut the batch into parts whose scores of a tile stay in a core's cache."""
    num_groups, repeats = k_BGSK.shape[1], q_BHSK.shape[1] // k_BGSK.shape[1]
    for rows, row_tiles in tiles:
        num_rows = len(range(*rows.indices(len(q_BHSK))))
        num_together = max(1, CACHED_SCORES // (num_rows * repeats * _largest(row_tiles)))
        for first in range(0, num_groups, num_together):
            groups = slice(first, first + num_together)
            yield _Part(rows, groups, row_tiles, scale, q_BHSK, k_BGSK, v_BGSK, log_gate_BHS)


def _add_product(total_NLK: Tensor, weight_NML: Tensor, x_NMK: Tensor) -> None:
    """total += weight^T x; not by the operator in place, which PyTorch's FLOP counter would not see."""
    torch.baddbmm(total_NLK, weight_NML.transpose(1, 2), x_NMK, out=total_NLK)


def _largest(tiles: list[Tile]) -> int:
    """Query-key pairs of the largest tile."""
    return max((tile.end - tile.begin) * (tile.end - tile.first_key) for tile in tiles)


def _keep_masks(dropout: Dropout | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that draws 0 or 1 / (1 - probability) for one tile after the other, the same in both passes."""
    generator = torch.Generator(device).manual_seed(dropout.seed) if dropout else None
    return lambda like: (
        torch.empty_like(like).bernoulli_(1 - dropout.probability, generator=generator).div_(1 - dropout.probability)
    )
