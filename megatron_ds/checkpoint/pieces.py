"""Pieces: which elements of which tensor a stored run of values is.

Any way to shard a tensor comes down to one description: a box of the full tensor (tensor parallelism), flattened in
row-major order, and a range of that (ZeRO). The one idea here is that such a range is a handful of boxes: a part of a
first row, whole rows, a part of a last row, in every dimension. Two pieces cut in different ways therefore share an
intersection of boxes, and copying from one to the other is a few strided copies without an index per element.
Pure arithmetic and tensor views: no files, no ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""Part of a tensor: [lo, hi) for every dimension; empty for a scalar."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of the flattened ``box`` of a tensor.

    ``kind`` is "weight" or the optimizer's own name of a state ("exp_avg", "step" ...); ``shape`` is the full tensor's.
    Raises ValueError when the box leaves the shape or the range leaves the box.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    box: Box
    start: int
    length: int

    def __post_init__(self) -> None:
        inside = len(self.box) == len(self.shape) and all(
            0 <= lo <= hi <= size for (lo, hi), size in zip(self.box, self.shape)
        )
        if not inside:
            raise ValueError(f"{self.kind} of {self.name}: box {self.box} is not inside the shape {self.shape}")
        if self.start < 0 or self.length < 0 or self.start + self.length > volume(self.box):
            raise ValueError(
                f"{self.kind} of {self.name}: range [{self.start}, {self.start + self.length}) is not inside the "
                f"{volume(self.box)} elements of box {self.box}"
            )


@dataclass(frozen=True)
class Fragment:
    """A piece and its values: what a rank hands to the store.

    ``tensor`` is 1-D, of any dtype, on any device, with the elements [start, start + numel) of the flattened box.
    Raises ValueError when it is not 1-D or the place is impossible.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    box: Box
    start: int
    tensor: Tensor

    def __post_init__(self) -> None:
        if self.tensor.dim() != 1:
            raise ValueError(f"{self.kind} of {self.name}: a fragment is 1-D, not {tuple(self.tensor.shape)}")
        self.piece  # noqa: B018  (building it checks the place)

    @property
    def piece(self) -> Piece:
        """Where the values lie."""
        return Piece(self.name, self.kind, self.shape, self.box, self.start, self.tensor.numel())


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is the full tensor."""
    return tuple((0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """Extent of a box in every dimension."""
    return tuple(hi - lo for lo, hi in box)


def volume(box: Box) -> int:
    """Number of elements in a box."""
    return prod(sizes(box))


def covered(pieces: list[Piece]) -> int:
    """Elements that the pieces hold, each counted once within every box.

    Fewer than the tensor has proves a gap. Boxes that overlap count twice, so enough is no proof: reading decides.
    """
    count, box, end = 0, None, 0
    for piece in sorted(pieces, key=lambda piece: (piece.box, piece.start)):
        if piece.box != box:
            box, end = piece.box, 0
        count += max(0, piece.start + piece.length - max(end, piece.start))
        end = max(end, piece.start + piece.length)
    return count


def place(values: Tensor, filled: Tensor, want: Piece, source: Tensor, have: Piece) -> bool:
    """Copy into ``values`` whatever ``source`` holds of it, and mark that in ``filled``.

    ``values`` and ``filled`` (bool) are 1-D, the elements of ``want``; ``source`` is 1-D, those of ``have``.
    False when an element that was filled before has other bits in ``source``.
    """
    bits = _BITS[values.element_size()]
    agrees = True
    for want_box, want_offset in range_boxes(want.box, want.start, want.length):
        for have_box, have_offset in range_boxes(have.box, have.start, have.length):
            common = intersection(want_box, have_box)
            if common is None:
                continue
            old, known = (_view(flat, want_offset, want_box, common) for flat in (values, filled))
            new = _view(source, have_offset, have_box, common)
            if known.any():
                agrees &= not ((old.view(bits) != new.view(bits)) & known).any()
            old.copy_(new)
            known.fill_(True)
    return agrees


def range_boxes(box: Box, start: int, length: int, offset: int = 0) -> Iterator[tuple[Box, int]]:
    """Cut a range of a flattened box into boxes that are contiguous in it, each with its offset in the range."""
    if length == 0:
        return
    if not box:
        yield (), offset
        return
    (lo, _), inner = box[0], box[1:]
    row_length = volume(inner)
    while length:
        row, skipped = divmod(start, row_length)
        rows = 0 if skipped else length // row_length
        if rows:
            taken = rows * row_length
            yield ((lo + row, lo + row + rows), *inner), offset
        else:
            taken = min(length, row_length - skipped)
            for part, part_offset in range_boxes(inner, skipped, taken, offset):
                yield ((lo + row, lo + row + 1), *part), part_offset
        start, length, offset = start + taken, length - taken, offset + taken


def contiguous_runs(shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """First element and number of elements of every run that a box is in a row-major tensor, in order."""
    inner = len(shape)
    while inner and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    if not inner:
        yield 0, prod(shape)
        return
    unit, (lo, hi) = prod(shape[inner:]), box[inner - 1]
    for index in product(*(range(*side) for side in box[: inner - 1])):
        row = 0
        for place, size in zip(index, shape):
            row = row * size + place
        yield (row * shape[inner - 1] + lo) * unit, (hi - lo) * unit


def shared_runs(want: Piece, have: Piece) -> Iterator[tuple[int, int]]:
    """First element and number of elements of every run of the values of ``have`` that are also in ``want``."""
    for want_box, _ in range_boxes(want.box, want.start, want.length):
        for have_box, offset in range_boxes(have.box, have.start, have.length):
            common = intersection(want_box, have_box)
            if common is not None:
                inside = tuple((lo - edge, hi - edge) for (lo, hi), (edge, _) in zip(common, have_box))
                for first, count in contiguous_runs(sizes(have_box), inside):
                    yield offset + first, count


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None when that is nothing."""
    common = tuple((max(a_lo, b_lo), min(a_hi, b_hi)) for (a_lo, a_hi), (b_lo, b_hi) in zip(a, b))
    return common if all(lo < hi for lo, hi in common) else None


def _view(flat: Tensor, offset: int, box: Box, part: Box) -> Tensor:
    """The elements of ``part`` in the values of ``box``, which lie in ``flat`` from ``offset`` on."""
    values = flat[offset : offset + volume(box)].view(sizes(box))
    return values[tuple(slice(lo - first, hi - first) for (lo, hi), (first, _) in zip(part, box))]
