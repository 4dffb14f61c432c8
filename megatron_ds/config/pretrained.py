"""A run that begins with the weights of a Hugging Face model has that model's sizes, and need not repeat them.

What the directory says is a default: above the generation's, below the file's. Settings that the weights depend on
cannot be others, so a file or a flag that gives another value is an error, and all of them are told at once. How such
a directory is read is for the caller to bring along (``hf/sections.py``); here are only trees.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from megatron_ds.config.problems import Problem
from megatron_ds.config.tree import OURS, TAG, Path, Tree, flatten, full_path, lookup, remove
from megatron_ds.config.values import show

LOAD = (OURS, "checkpoint", "load")
MOE, ROPE = (OURS, "moe"), (OURS, "model", "rope_scaling")

ADJUSTABLE: tuple[Path, ...] = tuple(
    full_path(tuple(path.split(".")))
    for path in (
        "generation",
        "model.max_position_embeddings",
        "model.rotary_base",
        "model.rope_scaling",
        "model.rotary_interleaved",
        "model.untie_embeddings_and_output_weights",
        "model.mtp_num_layers",
        "moe.router.fine",
    )
)
"""What a run may have otherwise: the context is extended so, and to the rest the weights are adapted as they are read,
or the reader says why they cannot be."""


@dataclass(frozen=True)
class Pretrained:
    """The settings of the model that a run begins with, and those of the user."""

    origin: str
    """Where they stand, for messages."""
    tree: Tree
    """A raw tree with our section only."""
    user: Tree
    """The file with the flags written into it."""

    @classmethod
    def of(cls, origin: str, sections: dict[str, Any], user: Tree) -> "Pretrained":
        """``sections``: generation, model and, for experts, moe; without it there are none, whatever the generation."""
        return cls(origin, {OURS: {"moe": None, **sections}}, user)

    def contradictions(self) -> Iterator[Problem]:
        """One problem for every setting of the user that the weights do not allow."""
        given, held = flatten(self.user), flatten(self.tree)
        found = {path: show(held[path]) for path, value in given.items() if value not in (None, held.get(path, value))}
        has_experts, asked = lookup(self.tree, MOE) is not None, lookup(self.user, MOE)
        if asked is not None and not has_experts:
            found[MOE] = "no experts"
        if asked is None and has_experts and MOE in given:
            found[MOE] = "experts"
        for path, has in found.items():
            if not any(path[: len(free)] == free for free in ADJUSTABLE):
                rule = f"the weights are of a model with {has} ({self.origin})"
                yield Problem(path, lookup(self.user, path), rule, "leave it out")

    def below(self) -> Tree:
        """The settings, without those that go with another way of extending the context than the user's."""
        tree = deepcopy(self.tree)
        kind = lookup(self.user, (*ROPE, TAG))
        if kind is not None and kind != lookup(tree, (*ROPE, TAG)):
            remove(tree, ROPE)
        return tree

    def sources(self) -> dict[Path, str]:
        """Path -> where its value comes from, for all that the user has not given."""
        given = flatten(self.user)
        return {path: self.origin for path in flatten(self.tree) if path not in given}
