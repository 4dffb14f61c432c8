"""Reading the configuration file: plain JSON, strict, with the position of every slip.

Reads text and finds what JSON itself would hide: where the syntax breaks, keys that are given twice, a name that is
nearly that of another file. What the keys mean is not known here (``check.py``).
"""

import json
from pathlib import Path as FilePath
from typing import Any

from pydantic_core import PydanticUndefined

from megatron_ds.config.problems import Findings, Problem
from megatron_ds.config.tree import Path, Tree, remove
from megatron_ds.config.values import nearest


class _Object(dict):
    """A JSON object that remembers which of its keys were given twice."""

    twice: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    names = [name for name, _ in pairs]
    result.twice = tuple(name for name in result if names.count(name) > 1)
    return result


def read_json(file: FilePath, findings: Findings) -> Tree | None:
    """The file as a raw tree, or None (and a problem recorded) when there is none to be had."""
    text = _read_text(file, findings)
    if text is None:
        return None
    try:
        tree = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{file}:{error.lineno}:{error.colno}: {error.msg}"
        lines = text.split("\n")  # as the parser counts; a file cut short is wrong on the line after its last one
        shown = lines[error.lineno - 1].strip() if text.strip() else PydanticUndefined
        findings.add(Problem((str(file),), shown, f"is not JSON: {place}", _syntax_fix(text, error)))
        return None
    if not isinstance(tree, dict):
        findings.add(Problem((str(file),), tree, "must hold one object", 'write {"megatron_ds": {...}}'))
        return None
    for path, value in _given_twice(tree):
        findings.add(Problem(path, value, "the key is given twice", "keep one of the two"))
        remove(tree, path)
    return tree


def _read_text(file: FilePath, findings: Findings) -> str | None:
    """The file's text; what is in the way becomes a problem."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        rule, fix = f"must be UTF-8 text, but byte {error.start} is not", "save it as UTF-8"
    except FileNotFoundError:
        rule, fix = "no such file", _file_fix(file)
    except OSError as error:
        rule, fix = f"cannot be read: {error.strerror}", "give the path of a readable JSON file"
    findings.add(Problem(("--deepspeed_config",), str(file), rule, fix))
    return None


def _file_fix(file: FilePath) -> str:
    """What to try instead of a file that does not exist."""
    if not file.parent.is_dir():
        return f"the folder {file.parent} does not exist either"
    names = [entry.name for entry in file.parent.iterdir() if entry.suffix == ".json"]
    meant = nearest(file.name, names)
    if meant:
        return f"did you mean {file.parent / meant}?"
    return f"{file.parent} has {', '.join(sorted(names)[:8]) or 'no .json file'}"


def _syntax_fix(text: str, error: json.JSONDecodeError) -> str:
    """The likely repair of a syntax error, from the characters around it."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not text.strip():
        return "the file is empty"
    if not after:
        return "the file ends too early, finish it"
    if after.startswith(("/", "#")):
        return "JSON has no comments, delete it"
    # Python 3.13 points at the comma, older versions behind it.
    has_comma = before.endswith(",") or after.startswith(",")
    if has_comma and after.lstrip(", \t\r\n").startswith(("}", "]")):
        return "delete the last comma"
    if error.msg.startswith("Expecting ',' delimiter"):
        return "put a comma between the two entries"
    return "correct it there"


def _given_twice(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Paths of all keys that the text gave twice, with the value that came last."""
    found = [((*path, name), tree[name]) for name in getattr(tree, "twice", ())]
    if isinstance(tree, dict):
        for name, value in tree.items():
            found += _given_twice(value, (*path, name))
    return found
