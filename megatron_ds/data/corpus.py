"""A corpus that every machine has: the documentation and the sources of Python's standard library, as JSON lines.

    python -m megatron_ds.data.corpus data/raw --megabytes 24

No download and no licence question; the same Python gives the same file. Documents of both kinds come in one scrambled
but fixed order, so that the share which a split holds out at the end is like the rest.
"""

import argparse
import hashlib
import itertools
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from megatron_ds.data.indexed import write_atomically
from megatron_ds.errors import DataError, run_main

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data"})
"""Not the library itself, or tables rather than text; pydoc_data is read as documentation."""


def write_stdlib_corpus(directory: str | Path, megabytes: float = 24.0) -> Path:
    """Write ``stdlib.jsonl``: the language reference, and modules until there are ``megabytes`` MB of text.

    Each line has the keys ``source`` and ``text``. Returns the file. Raises DataError if it cannot be written.
    """
    path, budget = Path(directory) / "stdlib.jsonl", megabytes * 1e6
    lines = []
    for source, text in itertools.chain(topics.topics.items(), _modules()):
        if budget <= 0:
            break
        budget -= len(text.encode())
        lines.append((source, json.dumps({"source": source, "text": text}, ensure_ascii=False).encode() + b"\n"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(str(path), *(line for _, line in sorted(lines, key=lambda line: _scrambled("order", line[0]))))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    return path


def _scrambled(purpose: str, name: str) -> bytes:
    """Sort key that has nothing to do with the meaning of a name, nor with the key for another purpose."""
    return hashlib.sha256(f"{purpose} {name}".encode()).digest()


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    names = (file.as_posix() for file in files if SKIPPED_FOLDERS.isdisjoint(file.parts))
    for name in sorted(names, key=lambda name: _scrambled("choice", name)):
        try:
            with tokenize.open(root / name) as file:  # heeds the coding comment
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a test of wrong encodings
        if text.strip():
            yield name, text


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ds.data.corpus",
        description="Write the standard library's documentation and sources as JSON lines.",
        epilog="example: python -m megatron_ds.data.corpus data/raw --megabytes 24",
    )
    parser.add_argument("directory", help="folder to write stdlib.jsonl to")
    parser.add_argument("--megabytes", type=float, default=24.0, help="size of the text (default: %(default)s)")
    args = parser.parse_args(argv)
    path = write_stdlib_corpus(args.directory, args.megabytes)
    with open(path, "rb") as file:
        print(f"{path}: {sum(1 for _ in file):,} documents, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_main(_main)
