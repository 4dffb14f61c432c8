"""A raw tree against the schema: every mistake is found, and what is right survives.

Walks file and schema side by side. A wrong leaf is reported and left out, so that the rest can still be built with
defaults and the rules between sections can still run on it. Unknown keys are compared with their siblings, with the
other kinds of a tagged section, and with keys of the same name elsewhere. What takes two values to judge is in
``rules.py``.
"""

from typing import Any

from pydantic_core import PydanticUndefined

from megatron_ds.config.deepspeed_keys import Section
from megatron_ds.config.flags import FLAGS
from megatron_ds.config.problems import Findings, Problem
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import LEAF_PATHS, TAG, Path, Tree, dotted, keys_of, kind_of, variants_of
from megatron_ds.config.values import accepts, describe, is_optional, nearest, repair, show

_WRONG = object()
"""Stands for a value that was reported and is left out."""


def check(tree: Tree, findings: Findings) -> RunConfig:
    """The configuration that a raw tree describes; wrong parts are reported and take their defaults."""
    clean = _check_section(tree, RunConfig, None, (), findings)
    return RunConfig.model_validate(clean)


def _check_value(value: Any, annotation: Any, default: Any, path: Path, findings: Findings) -> Any:
    """A value, a cleaned section, or _WRONG."""
    if variants_of(annotation):
        return _check_section(value, annotation, default, path, findings)
    if accepts(annotation, value):
        return value
    findings.add(Problem(path, value, f"must be {describe(annotation)}", repair(value, annotation, default)))
    return _WRONG


def _check_section(value: Any, annotation: Any, default: Any, path: Path, findings: Findings) -> Any:
    """The keys of a section that hold, or _WRONG when no section can be built from them."""
    if value is None and is_optional(annotation):
        return None
    variants = variants_of(annotation)
    if not isinstance(value, dict):
        kind = value if value in [kind_of(variant) for variant in variants] else kind_of(variants[0])
        example = {TAG: kind} if kind else {next(iter(variants[0].model_fields)): "..."}
        findings.add(Problem(path, value, "must be an object", f"write it like {show(example)}"))
        return _WRONG
    section = _choose(value, variants, default, path, findings)
    keys = _keys((section,) if section else variants)
    clean: Tree = {TAG: kind_of(section)} if section and kind_of(section) else {}
    for name, item in value.items():
        if name == TAG and TAG in keys:
            continue
        if name not in keys:
            _report_unknown(name, item, section, variants, path, findings)
            continue
        field = section.model_fields.get(name) if section else None
        known_default = field.default if field else PydanticUndefined
        checked = _check_value(item, keys[name], known_default, (*path, name), findings)
        if checked is not _WRONG:
            clean[name] = checked
    return clean if section and _complete(section, clean, value, path, findings) else _WRONG


def _choose(
    value: Tree, variants: tuple[type[Section], ...], default: Any, path: Path, findings: Findings
) -> type[Section] | None:
    """The variant that the tag names; without a tag that of the default; None (reported) for a tag that names none."""
    by_kind = {kind_of(variant): variant for variant in variants}
    if None in by_kind:
        return variants[0]
    kind = value.get(TAG, getattr(default, TAG, None))
    if isinstance(kind, str) and kind in by_kind:
        return by_kind[kind]
    meant = nearest(str(kind), by_kind)
    fix = f"did you mean {show(meant)}?" if meant else f"the default is {show(getattr(default, TAG, None))}"
    rule = f"must be one of {', '.join(map(show, by_kind))}"
    findings.add(Problem((*path, TAG), kind, rule, fix), path)
    return None


def _complete(section: type[Section], clean: Tree, value: Tree, path: Path, findings: Findings) -> bool:
    """Whether all required keys are there; one that is simply missing is reported."""
    absent = [name for name, field in section.model_fields.items() if field.is_required() and name not in clean]
    for name in absent:
        if name in value:
            findings.spoiled.append(path)
            continue
        owner = f"{dotted(path)} of kind {kind_of(section)}" if kind_of(section) else dotted(path)
        words = describe(keys_of(section)[name])
        findings.add(Problem((*path, name), PydanticUndefined, f"{owner} needs it", f"give {words}"), path)
    return not absent


def _says_off(value: Any) -> bool:
    """Whether a refused key only says that its feature is off, as ported files often do."""
    return value is False or (isinstance(value, dict) and value.get("enabled") is False)


def _keys(variants: tuple[type[Section], ...]) -> dict[str, Any]:
    """The keys of any of the variants, with their types; the first variant that has a key gives the type."""
    keys: dict[str, Any] = {}
    for variant in variants:
        keys |= {name: annotation for name, annotation in keys_of(variant).items() if name not in keys}
    return keys


def _report_unknown(
    name: str,
    value: Any,
    section: type[Section] | None,
    variants: tuple[type[Section], ...],
    path: Path,
    findings: Findings,
) -> None:
    """Say why a key cannot be here, and where it belongs. Without a known kind (None) all variants are searched."""
    here = (*path, name)
    refused = variants[0].refused
    if name in refused:
        reason, fix = refused[name]
        if not _says_off(value):
            findings.add(Problem(here, value, f"is refused: {reason}", fix))
        return
    owners = [kind for kind in map(kind_of, (v for v in variants if name in keys_of(v))) if kind]
    if owners:
        fix = f"set {dotted((*path, TAG))} to {' or '.join(map(show, owners))}, or leave it out"
        rule = f"belongs to {', '.join(owners)}" + (f", not to {kind_of(section)}" if section else "")
        findings.add(Problem(here, value, rule, fix))
        return
    if (home := _HOMES.get(name)) is not None:
        findings.add(Problem(here, value, "unknown key here", f"its place is {dotted(home)}"), home)
        return
    meant = nearest(name, [*_keys((section,) if section else variants), *refused])
    fix = f"did you mean {meant}?" if meant else "leave it out (docs/configuration.md lists every key)"
    findings.add(Problem(here, value, "unknown key", fix), *([(*path, meant)] if meant else []))


def _homes() -> dict[str, Path]:
    """Where a key of this name belongs: for every name that has one place only, and for the names of flags."""
    places: dict[str, set[Path]] = {}
    for path in LEAF_PATHS:
        for end in range(1, len(path) + 1):
            places.setdefault(path[end - 1], set()).add(path[:end])
    unique = {name: next(iter(paths)) for name, paths in places.items() if len(paths) == 1}
    return {name[2:].replace("-", "_"): flag.leaves[0].path for name, flag in FLAGS.items()} | unique


_HOMES = _homes()
