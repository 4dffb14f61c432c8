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
from megatron_ds.config.tree import OURS, TAG, Path, Tree, dotted, flatten, full_path, lookup, overlap, remove
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
        held = flatten(self.tree)
        for path, value in flatten(self.user).items():
            if any(overlap(path, free) for free in ADJUSTABLE):
                continue
            if path in held:
                wrong, has = value is not None and value != held[path], show(held[path])
            else:
                wrong, has = self._contradicts_whole(path, value)
            if wrong:
                yield Problem(path, value, f"the weights are of a model with {has} ({self.origin})", "leave it out")

    def _contradicts_whole(self, path: Path, value: Any) -> tuple[bool, str]:
        """Whether experts are asked for where there are none, or none where there are; and what there is."""
        has_experts = lookup(self.tree, MOE) is not None
        if path == MOE:
            return has_experts and value is None, dotted(MOE)
        return not has_experts and overlap(path, MOE), "no experts"

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
