"""Text files -> tokenised corpus: read, encode in several processes, write in order.

Chunks of raw records go to the workers, encoded chunks come back in the order in which they were sent, so the output is
the same for any number of workers. Only the writer knows the files; a run that dies leaves no half corpus. How records
are read and judged is ``sources``' part.
"""

import io
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from megatron_ds.data.indexed import CorpusMeta, IndexedDatasetBuilder, optimal_dtype, write_atomically
from megatron_ds.data.sources import BadRecord, BadRecords, Chunk, input_bytes, parse, read_chunks
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class EncodeJob:
    """All that a worker needs; small enough to travel with every chunk."""

    tokenizer: str
    """Directory of the tokenizer."""
    keys: tuple[str, ...] = ("text",)
    """Fields of a record to encode; each becomes a corpus of its own."""
    append_eod: bool = True
    """End every document that is not empty with the end-of-document token."""


@dataclass(frozen=True)
class EncodedTexts:
    """The documents of one key in one chunk, n of them."""

    tokens: np.ndarray
    """Ids of all documents, one after another, in the corpus' type."""
    lengths: np.ndarray
    """int32[n]: tokens of each document."""
    text_bytes: np.ndarray
    """int64[n]: UTF-8 bytes of each document."""


@dataclass(frozen=True)
class EncodedChunk:
    """What a worker sends back for a chunk."""

    texts: tuple[EncodedTexts, ...]
    """One entry per key."""
    bad: list[BadRecord]
    num_bytes: int


@cache
def _tokenizer(directory: str) -> Tokenizer:
    return Tokenizer.load(directory)


def encode_chunk(chunk: Chunk, job: EncodeJob) -> EncodedChunk:
    """Parse and encode one chunk; runs in a worker."""
    tokenizer = _tokenizer(job.tokenizer)
    end = [tokenizer.eod_id] if job.append_eod else []
    ids: list[list[list[int]]] = [[] for _ in job.keys]
    sizes: list[list[int]] = [[] for _ in job.keys]
    bad = []
    for record in parse(chunk, job.keys):
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        for key, text in enumerate(record):
            encoded = tokenizer.encode(text)
            ids[key].append(encoded + end if encoded else encoded)
            sizes[key].append(len(text.encode()))
    dtype = optimal_dtype(tokenizer.vocab_size)
    texts = tuple(
        EncodedTexts(
            tokens=np.concatenate([np.empty(0, dtype), *(np.array(document, dtype) for document in documents)]),
            lengths=np.array([len(document) for document in documents], np.int32),
            text_bytes=np.array(size, np.int64),
        )
        for documents, size in zip(ids, sizes)
    )
    return EncodedChunk(texts, bad, chunk.num_bytes)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map`` over processes: results in order, a bounded number in flight; one worker is this process itself."""
    if workers == 1:
        yield from map(function, items)
        return
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # Spawned, not forked: a fork of a process with threads (tokenizers, torch) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=ignore_interrupt)
    try:
        window: deque = deque()
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > CHUNKS_PER_WORKER * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, perhaps for want of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Prepared:
    """A corpus that was written."""

    prefix: str
    meta: CorpusMeta
    seconds: float

    def __str__(self) -> str:
        meta, dtype = self.meta, optimal_dtype(self.meta.vocab_size).name
        return (
            f"{self.prefix}: {meta.documents:,} documents, {meta.tokens:,} tokens ({dtype}), "
            f"{meta.utf8_bytes:,} bytes of text, {meta.bytes_per_token:.3f} bytes/token, {self.seconds:.1f} s"
        )


class _CorpusWriter:
    """One corpus in the making: the pair, the bytes of its documents, the counts."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, append_eod: bool) -> None:
        self.builder = IndexedDatasetBuilder(prefix, optimal_dtype(tokenizer.vocab_size))
        self.vocab_size = tokenizer.vocab_size
        self.append_eod = append_eod
        self.tokens = 0
        self.text_bytes: list[np.ndarray] = []

    def add(self, texts: EncodedTexts) -> None:
        self.builder.add_documents(texts.tokens, texts.lengths)
        self.tokens += len(texts.tokens)
        self.text_bytes.append(texts.text_bytes)

    def finalize(self) -> CorpusMeta:
        text_bytes, buffer = np.concatenate(self.text_bytes), io.BytesIO()
        np.save(buffer, text_bytes)
        bin_crc32, idx_crc32 = self.builder.finalize()
        meta = CorpusMeta(
            documents=len(text_bytes),
            tokens=self.tokens,
            utf8_bytes=int(text_bytes.sum()),
            vocab_size=self.vocab_size,
            append_eod=self.append_eod,
            bin_crc32=bin_crc32,
            idx_crc32=idx_crc32,
        )
        write_atomically(f"{self.builder.prefix}.bytes.npy", buffer.getbuffer())
        meta.write(self.builder.prefix)
        return meta


def prepare(
    inputs: list[Path], output_prefix: str, job: EncodeJob, *, workers: int = 1, bad: BadRecords | None = None
) -> list[Prepared]:
    """Write one corpus per key: ``output_prefix``; with several keys, Megatron's ``{output_prefix}_{key}_document``.

    ``inputs`` come from ``sources.find_inputs``. The files do not depend on ``workers``. A corpus of the same name is
    replaced once the new one is whole. Raises DataError for input that cannot be used and files that cannot be written.
    """
    began = time.monotonic()
    bad = bad or BadRecords()
    texts = [path for path in inputs if ".txt" in path.suffixes[-2:]]
    if texts and len(job.keys) > 1:
        raise DataError(f"{texts[0]}: a text file has no keys; prepare it apart from --json-keys {' '.join(job.keys)}")
    tokenizer = _tokenizer(job.tokenizer)
    prefixes = [output_prefix] if len(job.keys) == 1 else [f"{output_prefix}_{key}_document" for key in job.keys]
    chunks = (chunk for path in inputs for chunk in read_chunks(path, job.keys))
    size = sum(map(input_bytes, inputs))
    try:
        with ExitStack() as stack:
            writers = []
            for prefix in prefixes:
                writers.append(_CorpusWriter(prefix, tokenizer, job.append_eod))
                stack.enter_context(writers[-1].builder)
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None))
            encoded = stack.enter_context(closing(ordered_map(partial(encode_chunk, job=job), chunks, workers)))
            documents = 0
            for chunk in encoded:
                for record in chunk.bad:
                    bad.add(record)
                for writer, text in zip(writers, chunk.texts):
                    writer.add(text)
                documents += len(chunk.texts[0].lengths)
                bar.update(chunk.num_bytes)
            bad.check(documents)
            metas = [writer.finalize() for writer in writers]
    except OSError as error:
        raise DataError(f"{output_prefix}: cannot be written ({error.strerror or error})") from error
    return [Prepared(prefix, meta, time.monotonic() - began) for prefix, meta in zip(prefixes, metas)]


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
