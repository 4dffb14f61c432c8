"""Text files in, documents out: txt, JSON lines (both also .gz, .zst), parquet and saved ``datasets`` folders.

Reading has two halves. ``read_chunks`` cuts a file into runs of raw records without looking into them; ``parse`` looks,
and may run in another process. A record that is no document becomes a ``BadRecord`` with its place and the reason, so
that one broken line among millions can be found or skipped. What breaks a whole file (a damaged archive, a missing
column) is a DataError.
"""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from megatron_ds.errors import DataError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "columns"}
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 1000
MAX_RECORD_BYTES = 1 << 26
"""Longest document, 64 MiB: a file without line ends must not fill the memory."""
MAX_REPORTED = 100
"""Bad records that are printed one by one; the rest is counted."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file, unparsed; small enough to be sent to another process."""

    path: str
    kind: Literal["text", "json", "columns"]
    first: int
    """Number of the first record, counted from 1: a line, or a row."""
    records: list[bytes | tuple[bytes | None, ...] | None]
    """Lines, a whole text, or one tuple of columns per row; None for one longer than MAX_RECORD_BYTES."""
    num_bytes: int
    """Bytes of the input file that were read for it."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document."""

    place: str
    """``file:line``, or ``file:row``."""
    reason: str


@dataclass
class BadRecords:
    """What to do with records that are no documents: stop at the first, or report and count up to a share."""

    policy: Literal["error", "skip"] = "error"
    max_fraction: float = 0.001
    """Largest share of bad records that ``skip`` tolerates."""
    count: int = field(default=0, init=False)

    def add(self, record: BadRecord) -> None:
        """Count and report one. Raises DataError under the policy ``error``."""
        if self.policy == "error":
            raise DataError(f"{record.place}: {record.reason}; mend it, or pass --on-bad-line skip")
        self.count += 1
        if self.count <= MAX_REPORTED:
            tqdm.write(f"skipped {record.place}: {record.reason}", file=sys.stderr)
        elif self.count == MAX_REPORTED + 1:
            tqdm.write(f"skipped more than {MAX_REPORTED} bad lines; further ones are only counted", file=sys.stderr)

    def check(self, documents: int) -> None:
        """Raise DataError if too many were skipped beside this number of good documents."""
        total = documents + self.count
        if not documents:
            raise DataError("the input has no document; check --input and --json-keys")
        if self.count > self.max_fraction * total:
            raise DataError(
                f"{self.count:,} of {total:,} lines are bad, more than --max-bad-fraction {self.max_fraction:g} "
                "allows; mend the input or raise it"
            )


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files and saved ``datasets`` folders named by paths, globs or folders, in a fixed order, each once.

    A folder stands for the .txt, .jsonl and .parquet files below it (a .json file there is rarely a corpus). Raises
    DataError for what does not exist or has an unknown format.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(pattern)] if os.path.exists(pattern) else [Path(p) for p in glob.glob(pattern, recursive=True)]
        files = [file for path in sorted(paths) for file in _files_below(path)]
        if not files:
            raise DataError(f"{pattern}: no such file, or a folder without {', '.join(FORMATS)} files; check --input")
        found |= dict.fromkeys(files)
    return list(found)


def _files_below(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        raise DataError(f"{path}: has the splits {', '.join(splits)}; name one, such as {path / splits[0]}")
    if is_saved_dataset(path):
        return [path]
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file() and ".json" not in file.suffixes)
        return sorted(file for file in files if _format_of(file))
    if not _format_of(path):
        raise DataError(f"{path}: unknown format; known are {', '.join(FORMATS)}, the text ones also with .gz or .zst")
    return [path]


def is_saved_dataset(path: Path) -> bool:
    """Whether ``datasets.Dataset.save_to_disk`` wrote this folder."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def input_bytes(path: Path) -> int:
    """Size of a file or folder on the disk, for the progress bar."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def _format_of(path: Path) -> str | None:
    compressed = path.suffix in COMPRESSIONS
    kind = FORMATS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if compressed and kind == "columns" else kind


def read_chunks(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """Cut one input into chunks; a file without records gives one chunk without records.

    ``keys`` are the columns wanted of a parquet file or a saved dataset. Raises DataError if the file cannot be read.
    """
    kind = "columns" if path.is_dir() else _format_of(path)
    reader = {"text": _read_text, "json": _read_lines, "columns": _read_columns}[kind]
    empty = True
    for chunk in reader(path, keys):
        empty = False
        yield chunk
    if empty:
        yield Chunk(str(path), kind, 1, [], 0)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed bytes of a file, and the file itself, whose position tells the progress."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream, raw
            elif path.suffix == ".zst":
                import pyarrow as pa

                with pa.CompressedInputStream(raw, "zstd") as stream:
                    yield io.BufferedReader(stream, CHUNK_BYTES), raw
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged archive ({error}); copy the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); copy the file again") from error


def _read_text(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    with _opened(path) as (stream, raw):
        text = stream.read(MAX_RECORD_BYTES + 1)
        if text:
            yield Chunk(str(path), "text", 1, [text if len(text) <= MAX_RECORD_BYTES else None], raw.tell())


def _read_lines(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    with _opened(path) as (stream, raw):
        first, lines, size, position = 1, [], 0, 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                while not line.endswith(b"\n") and (line := stream.readline(CHUNK_BYTES)):
                    pass
                line = None
            lines.append(line)
            size += len(line or b"")
            if size >= CHUNK_BYTES:
                yield Chunk(str(path), "json", first, lines, raw.tell() - position)
                first, lines, size, position = first + len(lines), [], 0, raw.tell()
        if lines:
            yield Chunk(str(path), "json", first, lines, raw.tell() - position)


def _read_columns(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    import pyarrow as pa

    try:
        num_rows, batches = _saved_batches(path) if path.is_dir() else _parquet_batches(path, keys)
        first, num_bytes = 1, input_bytes(path) / max(1, num_rows)
        for batch in batches:
            for key in keys:
                if key not in batch.schema.names:
                    raise DataError(f"{path}: has no column {key!r}, only {', '.join(batch.schema.names)}")
                if not pa.types.is_large_string(kind := batch.schema.field(key).type) and not pa.types.is_string(kind):
                    raise DataError(f"{path}: column {key!r} has type {kind}, not string; choose one with --json-keys")
            # As bytes, so that a wrong encoding is found record by record.
            columns = [batch.column(key).cast(pa.large_binary()).to_pylist() for key in keys]
            yield Chunk(str(path), "columns", first, list(zip(*columns)), round(num_bytes * batch.num_rows))
            first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the file again") from error


def _parquet_batches(path: Path, keys: Sequence[str]) -> tuple[int, Iterator[Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    known = set(file.schema_arrow.names)
    columns = list(keys) if known.issuperset(keys) else None
    return file.metadata.num_rows, file.iter_batches(batch_size=CHUNK_ROWS, columns=columns)


def _saved_batches(path: Path) -> tuple[int, Iterator[Any]]:
    from datasets import load_from_disk

    dataset = load_from_disk(str(path)).with_format("arrow")
    return len(dataset), dataset.iter(batch_size=CHUNK_ROWS)


def parse(chunk: Chunk, keys: Sequence[str]) -> Iterator[tuple[str, ...] | BadRecord]:
    """The documents of a chunk, one text per key each, and its bad records, in order; blank lines are left out."""
    if not chunk.records:
        yield BadRecord(f"{chunk.path}:1", "empty file")
    for number, record in enumerate(chunk.records, chunk.first):
        if chunk.kind == "json" and record is not None and not record.strip():
            continue
        try:
            yield _parse_record(chunk.kind, record, keys, is_first=number == 1)
        except UnicodeDecodeError as error:
            yield BadRecord(f"{chunk.path}:{number}", f"invalid UTF-8 at byte {error.start}")
        except UnicodeEncodeError:
            yield BadRecord(f"{chunk.path}:{number}", "text has half a surrogate pair, which no UTF-8 text can hold")
        except json.JSONDecodeError as error:
            yield BadRecord(f"{chunk.path}:{number}", f"invalid JSON, {error.msg} (character {error.pos})")
        except RecursionError:
            yield BadRecord(f"{chunk.path}:{number}", "JSON is nested too deeply")
        except ValueError as error:
            yield BadRecord(f"{chunk.path}:{number}", str(error))


def _parse_record(kind: str, record: Any, keys: Sequence[str], *, is_first: bool) -> tuple[str, ...]:
    if record is None:
        raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB; cut it into several documents")
    if kind == "text":
        return (record.decode("utf-8-sig"),)
    if kind == "columns":
        values = [value if value is None else value.decode() for value in record]
    else:
        text = record.rstrip(b"\r\n").decode("utf-8-sig" if is_first else "utf-8")
        line = json.loads(text, object_pairs_hook=_unique_keys)
        if not isinstance(line, dict):
            raise ValueError(f"a JSON {type(line).__name__}, not an object; write one object per line")
        if missing := [key for key in keys if key not in line]:
            raise ValueError(f"missing key {missing[0]!r}; the line has {', '.join(map(repr, line)) or 'none'}")
        values = [line[key] for key in keys]
    for key, value in zip(keys, values):
        if not isinstance(value, str):
            raise ValueError(f"{key!r} is {'null' if value is None else type(value).__name__}, not a string")
        value.encode()  # JSON can spell characters that are none.
    return tuple(values)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in names if names.count(key) > 1)!r}")
    return value


def read_texts(inputs: Sequence[Path], keys: Sequence[str], bad: BadRecords, description: str) -> Iterator[str]:
    """All texts of all inputs in this process, with a progress bar; ``bad`` judges what is none."""
    documents = 0
    size = sum(map(input_bytes, inputs))
    with tqdm(total=size, unit="B", unit_scale=True, desc=description, disable=None) as bar:
        for chunk in (chunk for path in inputs for chunk in read_chunks(path, keys)):
            for record in parse(chunk, keys):
                if isinstance(record, BadRecord):
                    bad.add(record)
                else:
                    documents += 1
                    yield from record
            bar.update(chunk.num_bytes)
    bad.check(documents)
