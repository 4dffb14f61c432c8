"""Which tokens sample k of a corpus holds: a pure function of (seed, k), for every k >= 0.

An epoch lays the documents in a random order end to end and cuts that stream into samples of S + 1 tokens that share
one token with the next (Megatron's GPT stream: every token but the first is a target once); the samples are visited
in a random order. Sample k is number k mod n of epoch k // n, n samples per epoch, so the order depends neither on the
length of the run nor on the number of ranks, and resuming needs no state. What the stream leaves over at its end is
dropped, or kept as a shorter sample where every token counts (evaluation). Padding and batches are ``loader``'s part.
"""

import hashlib
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ds.config.blend import parse_split
from megatron_ds.data.cache import build_once
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.errors import DataError

CACHE_FROM = 1 << 20
"""Documents and samples of an epoch from which its order is kept on the disk; below, it takes milliseconds to make."""
KEPT_EPOCHS = 2
ORDER_VERSION = 1


class Span(NamedTuple):
    """A piece of a document: ``length`` tokens from ``offset`` on."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Sample:
    """S + 1 consecutive tokens of an epoch's stream (fewer in an epoch's last sample, if that is kept)."""

    token_S1: np.ndarray
    """int64: token ids."""
    document_S1: np.ndarray
    """int64: 0, 1, 2 ... in order of the documents in the sample."""
    where: tuple[Span, ...]
    """Which pieces of the corpus these are; one span per document."""
    source: str
    """Prefix of the corpus."""

    @property
    def name(self) -> str:
        """``prefix:document:offset`` of the first token."""
        return f"{self.source}:{self.where[0].document}:{self.where[0].offset}"


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray
    """[documents]: the documents in the order of the stream."""
    starts: np.ndarray
    """int64[documents + 1]: position of each in the stream, and the stream's length."""
    order: np.ndarray
    """[samples]: the samples in the order in which they are visited."""


def split_documents(split: str, num_documents: int) -> list[range]:
    """Documents for training, validation and test after shares such as ``969,30,1`` (Megatron's rounding).

    Raises ConfigError if ``split`` is none.
    """
    borders = accumulate(parse_split(split), initial=0.0)
    # Python's round, like Megatron's: halves go to the even neighbour.
    return [range(start, stop) for start, stop in pairwise(round(border * num_documents) for border in borders)]


def _permutation(count: int, *key: int) -> np.ndarray:
    """A random order of 0..count - 1, the same for the same key for ever."""
    # RandomState's stream is frozen by numpy's policy (NEP 19), Generator's may change: a run that resumes after an
    # upgrade must see the same order.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))
    return generator.permutation(count).astype(np.int32 if count < 1 << 31 else np.int64)


class SampleIndex:
    """The samples of some documents of a corpus.

    ``cache_dir`` keeps the orders of large corpora; they do not depend on the number of training steps. ``keep_tail``
    keeps an epoch's last, shorter sample. Raises DataError if the documents hold no sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        seq_length: int,
        seed: int,
        *,
        cache_dir: Path | None = None,
        keep_tail: bool = False,
    ) -> None:
        self.dataset = dataset
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self._lengths = np.diff(dataset.document_offsets[documents.start : documents.stop + 1])
        self.num_tokens = int(self._lengths.sum())
        needed = 2 if keep_tail else seq_length + 1
        if self.num_tokens < needed:
            raise DataError(
                f"{dataset.prefix}: {len(documents)} of its {dataset.num_documents} documents hold {self.num_tokens} "
                f"tokens, but a sample needs {needed}; give more text, another data.split or a shorter model.seq_length"
            )
        targets = self.num_tokens - 1
        self.num_samples = -(-targets // seq_length) if keep_tail else targets // seq_length
        self._cache: Path | None = None
        if cache_dir and len(documents) + self.num_samples >= CACHE_FROM:
            key = hashlib.sha256(f"{ORDER_VERSION} {seed} {self.num_samples}".encode() + self._lengths.tobytes())
            self._cache = cache_dir / f"{Path(dataset.prefix).name}-{key.hexdigest()[:16]}"
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Samples per epoch."""
        return self.num_samples

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k`` of the endless sequence of epochs."""
        assert k >= 0, f"sample {k}"
        number, position = divmod(k, self.num_samples)
        epoch = self._epoch(number)
        start = int(epoch.order[position]) * self.seq_length
        stop = min(start + self.seq_length + 1, self.num_tokens)
        # The last document that begins at or before the start: empty ones before it begin there too.
        place = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        spans, token_parts = [], []
        while start < stop:
            begin, end = int(epoch.starts[place]), min(int(epoch.starts[place + 1]), stop)
            if start < end:
                document = self.documents.start + int(epoch.documents[place])
                spans.append(Span(document, start - begin, end - start))
                token_parts.append(self.dataset.document(document)[start - begin : end - begin])
                start = end
            place += 1
        return Sample(
            token_S1=np.concatenate(token_parts).astype(np.int64),
            document_S1=np.repeat(np.arange(len(spans)), [span.length for span in spans]),
            where=tuple(spans),
            source=self.dataset.prefix,
        )

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token of these documents; None if the corpus does not know its bytes."""
        if self.dataset.text_bytes is None:
            return None
        return float(self.dataset.text_bytes[self.documents.start : self.documents.stop].sum()) / self.num_tokens

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) == KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = self._build(number) if self._cache is None else self._load(number)
        return self._epochs[number]

    def _build(self, number: int) -> _Epoch:
        documents = _permutation(len(self._lengths), self.seed, number, 0)
        starts = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(self._lengths[documents], out=starts[1:])
        return _Epoch(documents, starts, _permutation(self.num_samples, self.seed, number, 1))

    def _load(self, number: int) -> _Epoch:
        """The epoch from the cache, where the first of all processes to ask puts it."""
        folder = self._cache / f"epoch{number}"

        def write(temporary: Path) -> None:
            temporary.mkdir()
            for name, values in vars(self._build(number)).items():
                np.save(temporary / f"{name}.npy", values)

        build_once(folder, write)
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _Epoch.__dataclass_fields__]
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder}: damaged ({error}); delete this folder, it is made again") from error
        return _Epoch(*map(np.asarray, arrays))
