"""What two checkpoints do not have in common, whatever layouts wrote them.

Settings, names, shapes and dtypes come from the headers at once; values are read only when asked for, a block of a
tensor at a time. Tensors are compared as they are defined, not as they are stored, so the same state that other ranks
cut differently is the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from tqdm import tqdm

from megatron_ds.checkpoint.pieces import whole
from megatron_ds.checkpoint.reader import Checkpoint

BLOCK = 1 << 22
"""Elements that are compared at a time."""

Key = tuple[str, str]
"""Logical name and kind of a tensor."""


@dataclass(frozen=True)
class ValueDifference:
    """How the values of one tensor differ; NaN in both is no difference."""

    name: str
    kind: str
    differing: int
    """Elements that differ."""
    elements: int
    largest: float
    """max |a - b| over the elements that differ; NaN when only one of two is a number."""


def settings_differences(a: dict, b: dict) -> list[str]:
    """One line per leaf of two JSON trees that differs: ``path: a -> b``."""
    flat_a, flat_b = _flat(a), _flat(b)
    return [
        f"{path}: {flat_a.get(path, '(none)')} -> {flat_b.get(path, '(none)')}"
        for path in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(path) != flat_b.get(path)
    ]


def tensor_differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """One line per tensor that only one has, or that has another shape or dtype, and per kind that only one has."""
    in_a, in_b = _shapes(a), _shapes(b)
    kinds_a, kinds_b = ({kind for _, kind in shapes} for shapes in (in_a, in_b))
    lines = [f"{kind}: only in {'a' if kind in kinds_a else 'b'}" for kind in sorted(kinds_a ^ kinds_b)]
    for name, kind in sorted(key for key in in_a.keys() | in_b.keys() if key[1] in kinds_a & kinds_b):
        key = name, kind
        if key not in in_a or key not in in_b:
            lines.append(f"{kind} of {name}: only in {'a' if key in in_a else 'b'}")
            continue
        described = [f"{list(shapes[key])} {_dtype(of, key)}" for of, shapes in ((a, in_a), (b, in_b))]
        if described[0] != described[1]:
            lines.append(f"{kind} of {name}: {described[0]} -> {described[1]}")
    return lines


def value_differences(a: Checkpoint, b: Checkpoint) -> Iterator[ValueDifference]:
    """Every tensor whose values differ, of those that both have in one shape; reads all of them."""
    in_a, in_b = _shapes(a), _shapes(b)
    common = [key for key, shape in in_a.items() if in_b.get(key) == shape]
    total = sum(prod(in_a[key]) for key in common)
    with tqdm(total=total, desc="compare", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        for name, kind in common:
            shape, differing, largest = in_a[name, kind], 0, torch.zeros((), dtype=torch.float64)
            for start in range(0, prod(shape), BLOCK):
                place = name, kind, whole(shape), start, min(BLOCK, prod(shape) - start)
                values_a, values_b = a.read_range(*place).double(), b.read_range(*place).double()
                unequal = (values_a != values_b) & ~(values_a.isnan() & values_b.isnan())
                if unequal.any():
                    differing += int(torch.count_nonzero(unequal))
                    largest = torch.maximum(largest, (values_a - values_b)[unequal].abs().max())
                bar.update(place[-1])
            if differing:
                yield ValueDifference(name, kind, differing, prod(shape), largest.item())


def _shapes(checkpoint: Checkpoint) -> dict[Key, tuple[int, ...]]:
    """Shape of every tensor of every kind."""
    kinds = dict.fromkeys(kind for name in checkpoint.shapes() for kind in checkpoint.kinds(name))
    return {(name, kind): shape for kind in kinds for name, shape in checkpoint.shapes(kind).items()}


def _dtype(checkpoint: Checkpoint, key: Key) -> str:
    name, kind = key
    nothing = checkpoint.read_range(name, kind, whole(checkpoint.shapes(kind)[name]), 0, 0)
    return str(nothing.dtype).removeprefix("torch.")


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    """The leaves of a JSON tree by dotted path, as JSON: which, unlike Python, finds NaN equal to NaN."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.dumps(value)
    return leaves
