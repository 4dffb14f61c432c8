"""What one value may be: in words, as a test, and read from the text of a flag.

Error messages, help and the reference page describe a type in the same words, and a flag's text and a JSON value pass
the same strict test. Types are the schema's annotations; nothing here knows paths or sections.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_ds.config.list_expression import parse_integers

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_SHAPES = ("pattern", "form")
_MAX_SHOWN = 60


@dataclass(frozen=True)
class Form:
    """Part of a type: what a text looks like, in words, where its pattern would be hard to read."""

    form: str


def unwrap(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """A type without its bounds, and the bounds by name (gt, ge, lt, le, multiple_of, pattern, form)."""
    if get_origin(annotation) is not Annotated:
        return annotation, {}
    base, *metadata = get_args(annotation)
    flat = [item for m in metadata for item in (m.metadata if isinstance(m, FieldInfo) else (m,))]
    bounds = {name: getattr(item, name, None) for name in (*_BOUNDS, *_SHAPES) for item in flat if hasattr(item, name)}
    return base, bounds


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    base, bounds = unwrap(annotation)
    if get_origin(base) in (Union, UnionType):
        return get_args(base)
    return (annotation if bounds else base,)


def is_optional(annotation: Any) -> bool:
    """Whether null is allowed."""
    return NoneType in members(annotation)


def choices(annotation: Any) -> tuple[Any, ...]:
    """All values that are allowed by name, over the alternatives."""
    return tuple(c for m in members(annotation) if get_origin(m) is Literal for c in get_args(m))


def element_types(annotation: Any) -> set[Any]:
    """The types of the items of those alternatives that are lists: of named values their own, of texts with a form
    the whole annotation."""
    lists = [unwrap(member)[0] for member in members(annotation)]
    found: set[Any] = set()
    for item in (get_args(base)[0] for base in lists if get_origin(base) is tuple):
        base, bounds = unwrap(item)
        found |= set(map(type, get_args(base))) if get_origin(base) is Literal else {item if "form" in bounds else base}
    return found


def describe(annotation: Any) -> str:
    """A type in words: ``an integer > 0 or null``."""
    words = []
    for member in members(annotation):
        base, bounds = unwrap(member)
        origin, args = get_origin(base), get_args(base)
        if origin is Literal:
            words.append(("one of " if len(args) > 1 else "") + ", ".join(map(show, args)))
        elif origin is tuple and args[-1] is ...:
            plural = _PLURALS.get(args[0])
            words.append(f"a list of {plural}" if plural else f"a list, each {describe(args[0])}")
        elif origin is tuple:
            words.append(f"a list of {len(args)}, each {describe(args[0])}")
        elif origin is dict:
            words.append("an object of lists of strings")
        else:
            limits = [f"{sign} {bounds[name]}" for name, sign in _BOUNDS.items() if name in bounds]
            shape = [f"of the form {bounds['pattern']}"] if bounds.get("pattern") else []
            shape = [bounds["form"]] if "form" in bounds else shape
            words.append(" ".join([_NAMES[base], " and ".join(limits + shape)]).strip())
    return " or ".join(words)


def accepts(annotation: Any, value: Any) -> bool:
    """Strict test of a JSON value: "12" is no integer, true is no number, 12 is a float where one is asked for."""
    literals = choices(annotation)
    if any(value == choice and type(value) is type(choice) for choice in literals):
        return True
    rest = tuple(m for m in members(annotation) if get_origin(m) is not Literal)
    if not rest:
        return False
    try:
        adapter = TypeAdapter(Union[rest], config=ConfigDict(allow_inf_nan=False))  # noqa: UP007
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def parse(text: str, annotation: Any) -> Any:
    """The JSON value that a flag's text stands for; text that fits no alternative is returned as it is."""
    if is_optional(annotation) and text.lower() in ("none", "null"):
        return None
    for choice in choices(annotation):
        if text == str(choice):
            return choice
    bases = [unwrap(member)[0] for member in members(annotation)]
    if bool in bases and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in bases:
            try:
                return number(text)
            except ValueError:
                continue
    if tuple in map(get_origin, bases) and (integers := parse_integers(text)) is not None:
        return integers
    return text


def parse_list(texts: list[str], annotation: Any) -> Any:
    """The JSON value of a flag with several words; a single word may also be a single value, where there is such."""
    if len(texts) == 1 and len(members(annotation)) > 1 and (value := parse(texts[0], annotation)) is not texts[0]:
        return value
    (items,) = (get_args(base)[0] for base, _ in map(unwrap, members(annotation)) if get_origin(base) is tuple)
    return [parse(text, items) for text in texts]


def show(value: Any) -> str:
    """A value as it stands in the JSON file, cut to one line."""
    if value is PydanticUndefined:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def nearest(word: str, candidates: Any) -> str | None:
    """The candidate that the user probably meant."""
    found = get_close_matches(word, [str(c) for c in candidates], n=1, cutoff=0.6)
    return found[0] if found else None


def repair(value: Any, annotation: Any, default: Any) -> str:
    """What to write instead of a value that was not accepted."""
    options = choices(annotation)
    if isinstance(value, str) and (meant := nearest(value, options)):
        return f"did you mean {show(parse(meant, annotation))}?"
    for candidate, how in _rewrites(value, annotation):
        if accepts(annotation, candidate):
            return f"write {show(candidate)}, {how}"
    if default is PydanticUndefined:
        return f"choose {describe(annotation)}"
    return f"the default is {show(default)}"


def _rewrites(value: Any, annotation: Any) -> Iterator[tuple[Any, str]]:
    """Ways in which a value may have been meant, each with what to change."""
    if isinstance(value, str):
        yield parse(value.strip(), annotation), "without quotes"
        yield [value], "as a list"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value), "in quotes"
        if math.isfinite(value):
            yield int(value), "as an integer"
    elif isinstance(value, list):
        yield [str(item) for item in value], "with every item in quotes"
