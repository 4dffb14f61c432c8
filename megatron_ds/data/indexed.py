"""Megatron's tokenised corpus, byte-exact: a flat stream of token ids (.bin) and where its documents lie in it (.idx).

The stream has no header, padding or separator. The index holds, little-endian: magic, version, dtype code, the number
of sequences S and of document borders D + 1 (34 bytes), then lengths int32[S] in tokens, pointers int64[S] in bytes of
the stream and document borders int64[D + 1] in sequences. A document is one sequence or several; an empty one has none.
(Format: Megatron-LM, core/datasets/indexed_dataset.py.)

Nothing in these files protects itself, so opening checks all that must agree and names what does not. Beside a pair
that ``prepare`` wrote lie two files that Megatron does not know: ``.meta.json`` (counts and checksums) and
``.bytes.npy`` (UTF-8 bytes of each document, for losses in bits per byte). Text and samples are not known here.
"""

import json
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ds.data.cache import build_once
from megatron_ds.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
CHUNK_TOKENS = 1 << 24
CACHE_FROM_BYTES = 1 << 28
"""A stream of this size takes so long to scan that the result is worth a file."""


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice of token type: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class CorpusMeta:
    """What ``prepare`` counted while it wrote a pair; kept in ``<prefix>.meta.json``."""

    documents: int
    tokens: int
    utf8_bytes: int
    vocab_size: int
    append_eod: bool
    bin_crc32: int
    idx_crc32: int

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of text per token."""
        return self.utf8_bytes / max(1, self.tokens)

    def write(self, prefix: str) -> None:
        """Put the file beside the pair ``prefix``."""
        write_atomically(f"{prefix}.meta.json", (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, prefix: str) -> "CorpusMeta | None":
        """The file beside the pair ``prefix``, None if there is none; DataError if it is damaged."""
        path = Path(f"{prefix}.meta.json")
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it or prepare the corpus again") from error


def write_atomically(path: str, *parts: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it."""
    temporary = f"{path}.tmp-{os.getpid()}"
    _write_durably(temporary, *parts)
    os.replace(temporary, path)


def _write_durably(path: str, *parts: bytes) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


class IndexedDatasetBuilder:
    """Writes one pair; nothing is visible under ``prefix`` before ``finalize``. Use it in a ``with`` block.

    ``dtype`` is the type of the stream, see ``optimal_dtype``. The same documents give byte-identical files.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, known in DTYPES.items() if known == self.dtype), None)
        assert self._code is not None, f"{self.dtype} is no token type"
        # Arrays of machine integers: a list of Python ints would need ten times the memory of the index.
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        self._crc32 = 0
        self._temporary = {suffix: f"{self.prefix}.{suffix}.tmp-{os.getpid()}" for suffix in ("bin", "idx")}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self._temporary["bin"], "wb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be written ({error.strerror}); choose another prefix") from error

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        for temporary in self._temporary.values():
            Path(temporary).unlink(missing_ok=True)

    def add_document(self, tokens: np.ndarray | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Append one document of token ids, cut into sequences of ``lengths`` tokens (by default one)."""
        tokens = self._checked(tokens)
        lengths = ([len(tokens)] if len(tokens) else []) if lengths is None else lengths
        assert sum(lengths) == len(tokens), f"sequences of {lengths} tokens are not a document of {len(tokens)}"
        self._write(tokens.tobytes())
        self._lengths.extend(lengths)
        self._document_indices.append(len(self._lengths))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append ``len(lengths)`` documents of one sequence each, whose ids follow one another in ``tokens``."""
        tokens = self._checked(tokens)
        assert lengths.sum() == len(tokens), f"documents of {lengths.sum()} tokens in a stream of {len(tokens)}"
        self._write(tokens.tobytes())
        borders = len(self._lengths) + np.cumsum(lengths > 0)
        self._lengths.frombytes(lengths[lengths > 0].astype(np.int32).tobytes())
        self._document_indices.frombytes(borders.astype(np.int64).tobytes())

    def add_index(self, prefix: str | Path) -> None:
        """Append the whole pair ``prefix`` (merge). Raises DataError if its token type is another one."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                f"{prefix}.idx: tokens are {other.dtype}, those of {self.prefix} are {self.dtype}; "
                "prepare both with one tokenizer"
            )
        borders = len(self._lengths) + other.document_indices[1:]
        self._lengths.frombytes(other.lengths.tobytes())
        self._document_indices.frombytes(borders.tobytes())
        for start in range(0, other.num_tokens, CHUNK_TOKENS):
            self._write(other.tokens[start : start + CHUNK_TOKENS].tobytes())

    def finalize(self) -> tuple[int, int]:
        """Make the pair visible, in place of an older one; returns the CRC-32 of the .bin and of the .idx.

        A process killed at any moment leaves the old pair, the new one, or none.
        """
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        borders = np.frombuffer(self._document_indices, np.int64)
        header = HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(borders))
        parts = (header, lengths.tobytes(), (pointers * self.dtype.itemsize).tobytes(), borders.tobytes())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        _write_durably(self._temporary["idx"], *parts)
        # Without its index the old stream is no corpus, so the two renames below cannot mix an old with a new half.
        for suffix in (".idx", ".meta.json", ".bytes.npy"):
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix, temporary in self._temporary.items():
            os.replace(temporary, f"{self.prefix}.{suffix}")
        return self._crc32, crc32_of(parts)

    def _checked(self, tokens: np.ndarray | Sequence[int]) -> np.ndarray:
        tokens = np.asarray(tokens)
        if tokens.dtype != self.dtype and len(tokens):
            # A cast would wrap around in silence.
            low, high, limits = tokens.min(), tokens.max(), np.iinfo(self.dtype)
            if low < limits.min or high > limits.max:
                raise DataError(f"{self.prefix}: token ids {low}..{high} do not fit into {self.dtype}")
        return tokens.astype(self.dtype, copy=False)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)


def crc32_of(parts: Sequence[bytes]) -> int:
    """CRC-32 of the parts one after another."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


class IndexedDataset:
    """A pair opened for reading; the stream stays on the disk (memory map).

    Opening reads the whole index and raises DataError, naming the file and the fault, unless header, file sizes,
    lengths, pointers and document borders all agree.
    """

    prefix: str
    dtype: np.dtype
    """Type of the stream."""
    tokens: np.ndarray
    """The stream: ids of all documents, one after another."""
    lengths: np.ndarray
    """int32[S]: tokens of each sequence."""
    document_indices: np.ndarray
    """int64[documents + 1]: first sequence of each document, and S."""
    document_offsets: np.ndarray
    """int64[documents + 1]: position of each document in the stream, and the number of tokens."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index = _map_file(self.prefix, ".idx")
        self.dtype, num_sequences, num_borders = _read_header(f"{self.prefix}.idx", index)
        self.lengths, pointers, self.document_indices = (
            np.frombuffer(index, dtype, count, offset)
            for dtype, count, offset in (
                ("<i4", num_sequences, HEADER.size),
                ("<i8", num_sequences, HEADER.size + 4 * num_sequences),
                ("<i8", num_borders, HEADER.size + 12 * num_sequences),
            )
        )
        offsets = np.zeros(num_sequences + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=offsets[1:])
        self._check_index(pointers, offsets)
        stream = _map_file(self.prefix, ".bin")
        if len(stream) != offsets[-1] * self.dtype.itemsize:
            raise DataError(
                f"{self.prefix}.bin: has {len(stream):,} bytes, but the index tells of {offsets[-1]:,} tokens of "
                f"{self.dtype.itemsize} bytes; copy the file again or prepare it again"
            )
        self.tokens = stream.view(self.dtype)
        self.document_offsets = offsets[self.document_indices]

    def _check_index(self, pointers: np.ndarray, offsets: np.ndarray) -> None:
        path, borders = f"{self.prefix}.idx", self.document_indices
        if np.any(self.lengths < 0):
            raise _damaged(path, f"sequence {np.argmax(self.lengths < 0)} has a negative length")
        wrong = pointers != offsets[:-1] * self.dtype.itemsize
        if np.any(wrong):
            raise _damaged(path, f"pointer of sequence {np.argmax(wrong)} does not follow from the lengths")
        if borders[0] != 0 or borders[-1] != len(self.lengths):
            raise _damaged(path, f"documents span {borders[0]}..{borders[-1]}, the sequences 0..{len(self.lengths)}")
        if np.any(borders[1:] < borders[:-1]):
            raise _damaged(path, f"document {np.argmax(borders[1:] < borders[:-1])} ends before it begins")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return len(self.tokens)

    @cached_property
    def text_bytes(self) -> np.ndarray | None:
        """int64[documents]: UTF-8 bytes of each document's text; None for a corpus that other tools wrote."""
        path = f"{self.prefix}.bytes.npy"
        try:
            text_bytes = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it or prepare the corpus again") from error
        if text_bytes.shape != (self.num_documents,):
            raise DataError(f"{path}: belongs to another corpus; delete it or prepare the corpus again")
        return text_bytes

    def document(self, i: int) -> np.ndarray:
        """Token ids of document ``i``."""
        return self.tokens[self.document_offsets[i] : self.document_offsets[i + 1]]

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """``length`` token ids of a sequence from ``offset`` on, by default all that follow."""
        stop = self.lengths[sequence] if length is None else offset + length
        assert 0 <= offset <= stop <= self.lengths[sequence], f"{offset}..{stop} in sequence {sequence}"
        # Sequences lie in the stream in order, so their offsets are those of their documents plus what comes before.
        document = np.searchsorted(self.document_indices, sequence, side="right") - 1
        before = self.lengths[self.document_indices[document] : sequence].sum(dtype=np.int64)
        start = self.document_offsets[document] + before
        return self.tokens[start + offset : start + stop]


def _map_file(prefix: str, suffix: str) -> np.ndarray:
    path = Path(f"{prefix}{suffix}")
    try:
        # An empty file cannot be mapped; a plain array is faster to slice than numpy's memmap subclass.
        return np.asarray(np.memmap(path, np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        hint = "prepare it with megatron-ds prepare-data"
        found = sorted(str(other)[:-4] for other in path.parent.glob("*.idx"))[:5] if path.parent.is_dir() else []
        if prefix.endswith((".bin", ".idx")):
            hint = f"leave out the suffix: {prefix[:-4]}"
        elif suffix == ".idx" and found:
            hint = f"corpora in this folder: {', '.join(found)}"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {hint}") from error


def _read_header(path: str, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """Token type, number of sequences and number of document borders, after the checks that need no array."""
    if len(index) < HEADER.size or bytes(index[:9]) != MAGIC:
        raise _damaged(path, f"does not begin with Megatron's header {MAGIC!r}")
    _, version, code, num_sequences, num_borders = HEADER.unpack(index[: HEADER.size].tobytes())
    if version != VERSION:
        raise _damaged(path, f"format version is {version}, only version {VERSION} exists")
    if code in (6, 7):
        raise DataError(
            f"{path}: dtype code {code} is a float in Megatron's table, and tokens are integers; DeepSpeed's own "
            "indexed dataset means uint16 or uint32 by it: prepare the corpus again"
        )
    if code not in DTYPES:
        raise _damaged(path, f"dtype code {code} is none of {sorted(DTYPES)}")
    size = HEADER.size + 12 * num_sequences + 8 * num_borders
    if num_sequences and len(index) == size + num_sequences:
        raise DataError(f"{path}: holds the mode of each sequence (multimodal); only text corpora can be read")
    if num_borders < 1 or len(index) != size:
        raise _damaged(
            path, f"has {len(index):,} bytes; {num_sequences:,} sequences, {num_borders:,} borders need {size:,}"
        )
    return DTYPES[code], num_sequences, num_borders


def _damaged(path: str, fault: str) -> DataError:
    return DataError(f"{path}: {fault}; copy the file again or prepare it again")


def check_token_ids(dataset: IndexedDataset, vocab_size: int, cache_dir: Path | None = None) -> None:
    """Scan the stream: ids within 0..vocab_size - 1, and the pair's checksums where ``.meta.json`` has them.

    The result of a long scan is kept in ``cache_dir``, under sizes and times of the pair. Raises DataError naming the
    first token that is out of range, or the file whose checksum differs.
    """
    if cache_dir is None or dataset.tokens.nbytes < CACHE_FROM_BYTES:
        smallest, largest = _scan(dataset)
    else:
        stats = [os.stat(f"{dataset.prefix}{suffix}") for suffix in (".bin", ".idx")]
        key = "-".join(f"{stat.st_size:x}-{stat.st_mtime_ns:x}" for stat in stats)
        path = cache_dir / f"{Path(dataset.prefix).name}-{key}.scan.json"
        build_once(path, lambda temporary: temporary.write_text(json.dumps(_scan(dataset))))
        smallest, largest = json.loads(path.read_text())
    if smallest < 0 or largest >= vocab_size:
        raise _out_of_range(dataset, vocab_size)


def _scan(dataset: IndexedDataset) -> tuple[int, int]:
    """Smallest and largest id of the stream; DataError if a checksum differs."""
    meta = CorpusMeta.read(dataset.prefix)
    differs = "its checksum is not the one in .meta.json (delete that if another tool wrote the pair)"
    if meta and zlib.crc32(Path(f"{dataset.prefix}.idx").read_bytes()) != meta.idx_crc32:
        raise _damaged(f"{dataset.prefix}.idx", differs)
    crc, smallest, largest = 0, 0, -1
    starts = range(0, dataset.num_tokens, CHUNK_TOKENS)
    for start in tqdm(starts, desc=f"checking {dataset.prefix}", disable=None, delay=2):
        chunk = dataset.tokens[start : start + CHUNK_TOKENS]
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
        if meta:
            crc = zlib.crc32(chunk.view(np.uint8), crc)
    if meta and crc != meta.bin_crc32:
        raise _damaged(f"{dataset.prefix}.bin", differs)
    return smallest, largest


def _out_of_range(dataset: IndexedDataset, vocab_size: int) -> DataError:
    for start in range(0, dataset.num_tokens, CHUNK_TOKENS):
        chunk = dataset.tokens[start : start + CHUNK_TOKENS]
        outside = (chunk < 0) | (chunk >= vocab_size)
        if np.any(outside):
            break
    position = start + int(np.argmax(outside))
    document = int(np.searchsorted(dataset.document_offsets, position, side="right")) - 1
    return DataError(
        f"{dataset.prefix}.bin: token {position - dataset.document_offsets[document]} of document {document} is "
        f"{dataset.tokens[position]}, but the vocabulary has {vocab_size} ids; use the tokenizer of this corpus"
    )
