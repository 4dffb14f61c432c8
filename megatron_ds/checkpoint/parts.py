"""Parts: what lies on the nodes' disks, and which of it makes whole checkpoints.

A save over several nodes leaves a part on each, and perhaps a copy of it on the next. Where a part lies says nothing:
nodes are renumbered, replaced, lost. What counts is its manifest, which says to which save it belongs, so parts of two
saves of one step are never mixed. A save makes obsolete what was saved before it of its own step or of later ones: that
belongs to a branch of the run that was left. Nothing here knows ranks.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ds.checkpoint.manifest import Manifest
from megatron_ds.checkpoint.store import STEP_DIRECTORY
from megatron_ds.errors import CheckpointError

NEIGHBOUR = "neighbour"
"""Folder, in that of a node, with copies of another node's parts."""


class Save(NamedTuple):
    """What the parts of one save have in common; later saves are greater."""

    sequence: int
    identity: str
    step: int
    world_size: int
    nodes: int


@dataclass(frozen=True)
class Part:
    """A directory, relative to the tier's, that holds one node's part of a save."""

    place: str
    manifest: Manifest

    @classmethod
    def read(cls, directory: Path, place: str) -> "Part":
        """Read its manifest; CheckpointError when that is damaged, or not a part's."""
        if (directory / place).is_symlink():
            raise CheckpointError("symbolic links are refused")
        manifest = Manifest.read(directory / place)
        if manifest.part is None:
            raise CheckpointError("not a node's part of a checkpoint")
        return cls(place, manifest)

    @property
    def save(self) -> Save:
        """The save that it belongs to."""
        part = self.manifest.part
        return Save(part.sequence, part.save, self.manifest.step, self.manifest.world_size, part.nodes)

    @property
    def node(self) -> int:
        """The node that wrote it, by its index then."""
        return self.manifest.part.node


@dataclass(frozen=True)
class Whole:
    """A checkpoint of which every file is on some disk."""

    manifest: Manifest
    """Of the files of all parts."""
    places: dict[str, list[tuple[int, str]]]
    """File -> where it is: node by its index now, and directory there."""


def list_parts(directory: Path) -> tuple[list[Part], dict[str, str]]:
    """The parts on this disk, and the directories that should be parts and are not, with the reason."""
    parts, problems = [], {}
    for folder in ("node*", f"node*/{NEIGHBOUR}"):
        for path in sorted(directory.glob(f"{folder}/global_step*")):
            if STEP_DIRECTORY.fullmatch(path.name):
                place = path.relative_to(directory).as_posix()
                try:
                    parts.append(Part.read(directory, place))
                except CheckpointError as error:
                    problems[place] = str(error)
    return parts, problems


def current(saves: Iterable[Save]) -> list[Save]:
    """Of complete saves those that none has made obsolete, newest first; their steps descend, too."""
    kept: list[Save] = []
    for save in sorted(saves, reverse=True):
        if not kept or save.step < kept[-1].step:
            kept.append(save)
    return kept


def complete_saves(held: Iterable[tuple[Save, int]]) -> list[Save]:
    """The saves of which all nodes' parts are among ``held`` (save, node that wrote the part)."""
    nodes = defaultdict(set)
    for save, node in held:
        nodes[save].add(node)
    return [save for save, its_nodes in nodes.items() if its_nodes >= set(range(save.nodes))]


def merged(manifests: Iterable[Manifest]) -> Manifest:
    """The manifest of the files of all parts of a save; CheckpointError when two have different files of one name."""
    first, *others = manifests
    files = dict(first.files)
    for manifest in others:
        for name, entry in manifest.files.items():
            if files.setdefault(name, entry) != entry:
                raise CheckpointError(f"{name} is not the same in all parts of step {first.step}")
    return Manifest(step=first.step, world_size=first.world_size, files=files)


def assemble(parts: Iterable[tuple[int, Part]]) -> tuple[dict[int, Whole], list[str]]:
    """Checkpoints by step, newest first, from intact parts, each with the node that has it.

    Besides, a line for every save that is not among them: which part is nowhere, or which save came after it.
    """
    by_save: dict[Save, list[tuple[int, Part]]] = defaultdict(list)
    for holder, part in parts:
        by_save[part.save].append((holder, part))
    complete = complete_saves((save, part.node) for save, found in by_save.items() for _, part in found)
    newest, whole, lines = current(complete), {}, []
    for save in sorted(by_save, reverse=True):
        if save in newest:
            whole[save.step] = _whole(by_save[save])
        elif save in complete:
            later = min(other.step for other in newest if other > save)
            lines.append(f"step {save.step}: from before step {later} was saved; it belongs to a branch that was left")
        else:
            lost = set(range(save.nodes)) - {part.node for _, part in by_save[save]}
            names = ", ".join(map(str, sorted(lost)))
            lines.append(f"step {save.step}: no disk has a whole part of node {names} (of {save.nodes})")
    return whole, lines


def _whole(found: list[tuple[int, Part]]) -> Whole:
    places = defaultdict(list)
    for holder, part in found:
        for name in part.manifest.files:
            places[name].append((holder, part.place))
    return Whole(merged(part.manifest for _, part in found), dict(places))
