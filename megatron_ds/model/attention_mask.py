"""Which keys a query sees: one integer per query says it all.

Key j is visible to query i iff first_i <= j <= i, where first_i is the start of i's document or, in a local layer,
i - window if that is later. So the keys of consecutive queries are one contiguous range, and a *tile* of queries
needs masking only at its two ends: the causal triangle on its newest keys and an edge on its oldest. ``Packing`` cuts
a micro-batch into such tiles once, for all layers. What is computed on them is in ``tiled_attention.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE = 64
"""Queries per tile: the scores of a few heads stay in a core's cache, and little is spent on masked keys."""


@dataclass(frozen=True)
class Tile:
    """Queries [begin, end), n of them, and their keys [first_key, end)."""

    begin: int
    end: int
    first_key: int
    causal: Tensor
    """0 or -inf, [n, n], to add to the scores of the last n keys."""
    edge: Tensor | None
    """0 or -inf, [n, e], to add to the scores of the first e keys, those that not all n queries see."""
    far: Tensor | None
    """1 or 0, [n, f], over the first f keys: which of them are farther away than the soft gate's window."""

    @property
    def keys(self) -> slice:
        """The keys, as an index."""
        return slice(self.first_key, self.end)


def first_keys(start_S: Sequence[int], window: int | None) -> list[int]:
    """First visible key of each query, from the starts of their documents and the width of the window."""
    if window is None:
        return list(start_S)
    return [max(start, query - window) for query, start in enumerate(start_S)]


def key_ranges(first_S: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first_key) of every tile of queries."""
    for begin in range(0, len(first_S), QUERY_TILE):
        yield begin, min(begin + QUERY_TILE, len(first_S)), first_S[begin]


class Packing:
    """Which tokens of packed samples belong together, and the masks that the layers of one micro-batch share."""

    def __init__(self, document_BS: Tensor):
        """``document_BS``: int64; a document is a run of equal ids."""
        self.document_BS = document_BS
        self._tiles: dict[tuple[int | None, int | None], list[tuple[slice, list[Tile]]]] = {}
        self._masks_of: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Tensor, Tensor | None, Tensor | None]] = {}

    @cached_property
    def is_single(self) -> bool:
        """Whether every row is one document, so that causality is the whole mask."""
        return bool((self.document_BS == self.document_BS[:, :1]).all())

    @cached_property
    def start_BS(self) -> Tensor:
        """Index at which each token's document starts."""
        index_BS = torch.arange(self.document_BS.shape[1], device=self.document_BS.device).expand_as(self.document_BS)
        starts_here = self.document_BS[:, 1:] != self.document_BS[:, :-1]
        return F.pad(index_BS[:, 1:].where(starts_here, 0), (1, 0)).cummax(dim=1).values

    @cached_property
    def visible_B1SS(self) -> Tensor:
        """The mask of a global layer as one bool tensor, for kernels that want it so."""
        index_S = torch.arange(self.document_BS.shape[1], device=self.document_BS.device)
        return ((index_S >= self.start_BS[..., None]) & (index_S <= index_S[:, None])).unsqueeze(1)

    def tiles(self, window: int | None, gate_window: int | None = None) -> list[tuple[slice, list[Tile]]]:
        """Slices of the batch and the tiles of their rows: all rows at once where each is a single document.

        Args:
            window: largest visible distance, None for all.
            gate_window: distance up to which keys are not ``far``, for the soft gate.
        """
        key = (window, gate_window)
        if key not in self._tiles:
            starts = [[0] * self.document_BS.shape[1]] if self.is_single else self.start_BS.tolist()
            self._tiles[key] = [
                (slice(None) if self.is_single else slice(row, row + 1), self._row_tiles(start_S, window, gate_window))
                for row, start_S in enumerate(starts)
            ]
        return self._tiles[key]

    def _row_tiles(self, start_S: list[int], window: int | None, gate_window: int | None) -> list[Tile]:
        first_S, tiles = first_keys(start_S, window), []
        for begin, end, first_key in key_ranges(first_S):
            unseen = tuple(first - first_key for first in first_S[begin:end])
            reach = end if gate_window is None else gate_window
            far = tuple(max(0, query - reach - first_key) for query in range(begin, end))
            tiles.append(Tile(begin, end, first_key, *self._masks(unseen, far)))
        return tiles

    def _masks(self, unseen: tuple[int, ...], far: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """causal, edge and far of a tile, from how many of its first keys each query does not see and calls far."""
        if (unseen, far) not in self._masks_of:
            size, device = len(unseen), self.document_BS.device
            causal = torch.full((size, size), -torch.inf, device=device).triu_(1)
            edge = torch.zeros(size, unseen[-1], device=device).masked_fill_(_stair(unseen, device), -torch.inf)
            masks = causal, edge if unseen[-1] else None, _stair(far, device).float() if far[-1] else None
            self._masks_of[unseen, far] = masks
        return self._masks_of[unseen, far]


def _stair(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """bool [n, lengths[-1]] with that many leading True in each row; ``lengths`` never decrease."""
    return torch.arange(lengths[-1], device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
