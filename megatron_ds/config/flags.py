"""The command line: one flag per leaf of the schema, in Megatron's spelling, read into paths and values.

``--num-layers`` is ``megatron_ds.model.num_layers``; nested sections give a prefix (``--attention-window``) and a tag
is the section's own name (``--attention hybrid``). ``megatron_flags.py`` adds the names that the schema does not give,
and ``--set path=value`` reaches everything. Nothing is validated here beyond the form of the line: a flag's text
becomes the JSON value it stands for, so that one checker judges file and flags. The order of flags has no meaning.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_origin

from megatron_ds.config.blend import SET_NAME
from megatron_ds.config.megatron_flags import ALIASES, ALWAYS, IMPLIED, REFUSED_FLAGS, SHORTHANDS, VALUES
from megatron_ds.config.problems import Findings, Problem
from megatron_ds.config.tree import LEAVES, OURS, TAG, Leaf, Path, dotted, full_path
from megatron_ds.config.values import accepts, choices, element_types, members, nearest, parse, parse_list, show, unwrap

_NEGATIVE_NUMBER = re.compile(r"-\.?\d")
CONFIG_FLAGS = ("--deepspeed-config", "--config")
LAUNCHER_FLAGS = ("--deepspeed", "--local-rank")
"""What launchers and their scripts add: accepted, without effect."""


@dataclass(frozen=True)
class Flag:
    """A flag that writes one leaf, or one element of it."""

    name: str
    path: Path
    leaves: tuple[Leaf, ...]
    """The leaf, once per variant that has it."""

    @property
    def annotation(self) -> Any:
        """The type of the value; for an element of a list that of the element."""
        whole = self.leaves[0].annotation
        return unwrap(whole)[0].__args__[int(self.path[-1])] if self.path[-1].isdigit() else whole

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand without a value and has a --no- form."""
        return bool in [unwrap(member)[0] for member in members(self.annotation)]

    @property
    def container(self) -> type | None:
        """tuple for flags with several values, dict for name=value, None for a single value."""
        origins = [get_origin(unwrap(member)[0]) for member in members(self.annotation)]
        return next((origin for origin in origins if origin in (tuple, dict)), None)


def _by_path() -> dict[Path, tuple[Leaf, ...]]:
    grouped: dict[Path, tuple[Leaf, ...]] = {}
    for leaf in LEAVES:
        grouped[leaf.path] = (*grouped.get(leaf.path, ()), leaf)
    return grouped


LEAVES_AT = _by_path()


def flag_name(path: Path) -> str:
    """The flag of one of our leaves: its name, after the names of nested sections; a tag is its section."""
    words = path[2:] if len(path) > 2 else path[1:]
    return "--" + "-".join(word for word in words if word != TAG).replace("_", "-")


def _flags() -> dict[str, Flag]:
    ours = {flag_name(path): path for path in LEAVES_AT if path[0] == OURS}
    aliases = {name: full_path(tuple(path.split("."))) for name, path in ALIASES.items()}
    paths = ours | aliases
    return {
        name: Flag(name, path, LEAVES_AT[path[:-1] if path[-1].isdigit() else path]) for name, path in paths.items()
    }


FLAGS: dict[str, Flag] = _flags()
KNOWN = (*FLAGS, *SHORTHANDS, *ALWAYS, *REFUSED_FLAGS, *CONFIG_FLAGS, "--set", "--help")


@dataclass
class CommandLine:
    """What a command line says."""

    file: str | None = None
    """The configuration file."""
    help: bool = False
    """Whether --help was asked for."""
    values: dict[Path, Any] = field(default_factory=dict)
    """Value by path, as JSON would have it."""
    flag_of: dict[Path, str] = field(default_factory=dict)
    """The flag that set each path."""

    def assign(self, path: Path, value: Any, flag: str, findings: Findings) -> None:
        """Set a path; a second, different value is a problem, since order has no meaning."""
        if path in self.values and self.values[path] != value:
            rule = f"contradicts {self.flag_of[path]}, which gave {dotted(path)} the value {show(self.values[path])}"
            findings.add(Problem((flag,), value, rule, "give it once"), path)
            return
        self.values[path] = value
        self.flag_of[path] = flag


def read_command_line(argv: list[str], findings: Findings) -> CommandLine:
    """All flags of a command line; everything that is wrong with their form goes to ``findings``."""
    line = CommandLine()
    used = []
    for name, texts in _groups(argv):
        used.append(name)
        if name in ("--help", "-h"):
            line.help = True
        elif name in CONFIG_FLAGS:
            _read_file_flag(name, texts, line, findings)
        elif name == "--set":
            _read_set(texts, line, findings)
        elif name in FLAGS:
            _read_flag(FLAGS[name], texts, line, findings)
        elif _negated(name) in FLAGS and FLAGS[_negated(name)].is_switch:
            _without_value(name, texts, findings)
            line.assign(FLAGS[_negated(name)].path, False, name, findings)
        elif name in SHORTHANDS:
            path, value = SHORTHANDS[name]
            _without_value(name, texts, findings)
            line.assign(full_path(tuple(path.split("."))), value, name, findings)
        elif name in LAUNCHER_FLAGS:
            if name == "--deepspeed" and texts:
                fix = f"did you mean --deepspeed_config {texts[0]}?"
                findings.add(Problem((name,), " ".join(texts), "takes no value", fix))
        else:
            _read_other(name, texts, findings)
    for flag, (path, value) in IMPLIED.items():
        if flag in used and (implied := full_path(tuple(path.split(".")))) not in line.values:
            line.assign(implied, value, flag, findings)
    return line


def _groups(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words that follow it. ``--num_layers=4`` reads as ``--num-layers 4``."""
    name, texts = "", []
    for word in argv:
        if not word.startswith("-") or _NEGATIVE_NUMBER.match(word):
            texts.append(word)
            continue
        if name or texts:
            yield name, texts
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        texts = [text] if equals else []
    if name or texts:
        yield name, texts


def _negated(name: str) -> str:
    return name.replace("--no-", "--", 1)


def _read_flag(flag: Flag, texts: list[str], line: CommandLine, findings: Findings) -> None:
    """The value of a flag that writes a leaf."""
    if flag.is_switch and not texts:
        line.assign(flag.path, True, flag.name, findings)
    elif not texts:
        findings.add(Problem((flag.name,), "", "needs a value", f"write {flag.name} {placeholder(flag)}"), flag.path)
    elif flag.container is dict:
        value = _named_lists(flag, texts, findings)
        line.assign(flag.path, value, flag.name, findings)
    elif flag.container is tuple:
        line.assign(flag.path, parse_list(texts, flag.annotation), flag.name, findings)
    elif len(texts) > 1:
        extra = " ".join(texts[1:])
        findings.add(Problem((flag.name,), texts, "takes one value", f"remove {show(extra)}"), flag.path)
    else:
        text = VALUES.get(flag.name, {}).get(texts[0], texts[0])
        line.assign(flag.path, parse(text, flag.annotation), flag.name, findings)


def _named_lists(flag: Flag, texts: list[str], findings: Findings) -> dict[str, list[str]]:
    """``a=x b=0.5 y 0.5 z`` as {"a": ["x"], "b": ["0.5", "y", "0.5", "z"]}."""
    lists: dict[str, list[str]] = {}
    current: list[str] | None = None
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and SET_NAME.fullmatch(name):
            current = lists.setdefault(name, [])
            current.append(value)
        elif current is None:
            findings.add(Problem((flag.name,), text, "starts without a name", f"write name={text}"), flag.path)
            return {}
        else:
            current.append(text)
    return lists


def placeholder(flag: Flag) -> str:
    """What stands for the value in help: N, X, TEXT, {full,hybrid} ..."""
    if flag.container is dict:
        return "NAME=PREFIX ..."
    names = {int: "N", float: "X", str: "TEXT"}
    if flag.container is tuple:
        items = element_types(flag.annotation)
        return "N ..." if int in items else "[WEIGHT] PREFIX ..." if str in items else "PHASE ..."
    words = []
    for member in members(flag.annotation):
        base = unwrap(member)[0]
        words += [str(choice) for choice in choices(base)] or ([names[base]] if base in names else [])
    if not words:
        return ""
    return words[0] if len(words) == 1 else "{" + ",".join(words) + "}"


def _read_file_flag(name: str, texts: list[str], line: CommandLine, findings: Findings) -> None:
    if len(texts) != 1:
        findings.add(Problem((name,), texts, "takes one file", "write --deepspeed_config FILE"))
    elif line.file is not None and os.path.normpath(line.file) != os.path.normpath(texts[0]):
        findings.add(Problem((name,), texts[0], f"contradicts the file {show(line.file)}", "give one file"))
    else:
        line.file = texts[0]


def _read_set(texts: list[str], line: CommandLine, findings: Findings) -> None:
    """``--set path=value``: the value as the leaf's type, else as JSON, else as text."""
    if not texts:
        findings.add(Problem(("--set",), "", "needs path=value", "write --set model.num_layers=4"))
    for text in texts:
        where, equals, given = text.partition("=")
        if not (equals and where):
            findings.add(Problem(("--set",), text, "must be path=value", f"write --set {text}=VALUE"))
            continue
        path = full_path(tuple(where.split(".")))
        line.assign(path, _set_value(path, given), f"--set {where}", findings)


def _set_value(path: Path, text: str) -> Any:
    for leaf in LEAVES_AT.get(path, ()):
        value = parse(text, leaf.annotation)
        if accepts(leaf.annotation, value):
            return value
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _without_value(name: str, texts: list[str], findings: Findings) -> None:
    if texts:
        findings.add(Problem((name,), " ".join(texts), "takes no value", "leave the value out"))


def _read_other(name: str, texts: list[str], findings: Findings) -> None:
    """Flags that write nothing: what is always so, what is refused, what is unknown."""
    value = " ".join(texts)
    if name in ALWAYS:
        allowed, fact = ALWAYS[name]
        if (value and not allowed) or (allowed and value not in allowed):
            fix = f"write {name} {allowed[0]} or leave it out" if allowed else "leave the value out"
            findings.add(Problem((name,), value, f"cannot be changed: {fact}", fix))
    elif name in REFUSED_FLAGS:
        reason, fix = REFUSED_FLAGS[name]
        findings.add(Problem((name,), value, f"is refused: {reason}", fix))
    elif not name:
        findings.add(Problem(("command line",), value, "belongs to no flag", "write --flag VALUE"))
    else:
        meant = nearest(name, (*KNOWN, *(f"--no-{n[2:]}" for n, flag in FLAGS.items() if flag.is_switch)))
        fix = f"did you mean {meant}?" if meant else "--help lists all flags"
        target = FLAGS.get(meant or "") or FLAGS.get(_negated(meant or ""))
        findings.add(Problem((name,), value, "unknown flag", fix), *([target.path] if target else []))
