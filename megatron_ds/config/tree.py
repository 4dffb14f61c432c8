"""The schema as data: every leaf of the configuration with its path, type, default and documentation.

pydantic keeps the schema as classes. Flags, help, the reference page, the checker and the printed difference need it as
a list of paths, and this walk is the one place that knows how sections, optional sections and tagged unions nest. It
also holds the few operations on raw trees (nested dictionaries) that those modules share. No values are judged here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_ds.config.deepspeed_keys import Section
from megatron_ds.config.schema import MegatronDs, RunConfig

Path = tuple[str, ...]
Tree = dict[str, Any]

OURS = "megatron_ds"
TAG = "kind"


@dataclass(frozen=True)
class Leaf:
    """One setting. A leaf that several variants of a tagged section share appears once per variant."""

    path: Path
    """Keys from the root."""
    annotation: Any
    """Type with its bounds."""
    default: Any
    """Default value; ``PydanticUndefined`` when there is none."""
    doc: str
    """What it means; empty for keys that are passed on unread."""
    variant: str | None
    """The kind of the tagged section that has it; None outside tagged sections and for the tag itself."""
    owner: type[Section]
    """The section that holds it."""


def dotted(path: Path) -> str:
    """A path as users write it: ``megatron_ds.model.num_layers``."""
    return ".".join(path)


def annotation_of(field: FieldInfo) -> Any:
    """A field's type with its bounds, which pydantic keeps apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def variants_of(annotation: Any) -> tuple[type[Section], ...]:
    """The section classes that a field may hold: none for a leaf, several for a tagged union."""
    members = get_args(annotation) or (annotation,)
    return tuple(member for member in members if isinstance(member, type) and issubclass(member, Section))


def kind_of(section: type[Section]) -> str | None:
    """The tag of a variant, None for a section without one."""
    field = section.model_fields.get(TAG)
    return field.default if field else None


def keys_of(section: type[Section]) -> dict[str, Any]:
    """All keys that a section accepts, with their types; those that are passed on unread come last."""
    return {name: annotation_of(field) for name, field in section.model_fields.items()} | section.passed_on


def leaves(section: type[Section] = RunConfig, path: Path = (), variant: str | None = None) -> Iterator[Leaf]:
    """Every leaf below a section, in the order of the schema."""
    for name, annotation in keys_of(section).items():
        field = section.model_fields.get(name)
        inner = variants_of(annotation)
        default = field.default if field else PydanticUndefined
        if not inner:
            if name != TAG:
                doc = (field.description or "") if field else ""
                yield Leaf((*path, name), annotation, default, doc, variant, section)
            continue
        kinds = tuple(kind for kind in map(kind_of, inner) if kind)
        if kinds:
            doc = "; ".join(f"{kind}: {_summary(cls)}" for kind, cls in zip(kinds, inner, strict=True))
            yield Leaf((*path, name, TAG), Literal[kinds], getattr(default, TAG), doc, variant, section)
        for cls in inner:
            yield from leaves(cls, (*path, name), kind_of(cls) or variant)


def _summary(section: type[Section]) -> str:
    first, *_ = (section.__doc__ or "").strip().split("\n")
    return first.rstrip(".")


LEAVES: tuple[Leaf, ...] = tuple(leaves())
LEAF_PATHS: frozenset[Path] = frozenset(leaf.path for leaf in LEAVES)


def full_path(path: Path) -> Path:
    """Complete the short form ``model.num_layers`` to ``megatron_ds.model.num_layers``."""
    return (OURS, *path) if path and path[0] in MegatronDs.model_fields else path


def flatten(tree: Tree, path: Path = ()) -> dict[Path, Any]:
    """The leaves of a raw tree by path. A leaf that is itself a dictionary stays whole."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        inner = (*path, key)
        if isinstance(value, dict) and inner not in LEAF_PATHS:
            flat |= flatten(value, inner)
        else:
            flat[inner] = value
    return flat


def lookup(tree: Any, path: Path, default: Any = None) -> Any:
    """The value at a path of a raw tree, or the default where the path leads nowhere."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def write(tree: Tree, path: Path, value: Any) -> bool:
    """Set a value in place, making sections on the way; False when something that is no section stands in the way."""
    for key in path[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return False
    tree[path[-1]] = value
    return True


def remove(tree: Tree, path: Path) -> None:
    """Delete a path in place; nothing happens where it leads nowhere."""
    parent = lookup(tree, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def overlap(a: Path, b: Path) -> bool:
    """Whether one path is the other or lies below it."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]
