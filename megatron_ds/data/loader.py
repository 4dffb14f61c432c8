"""Samples -> batches: the sets of a run, and each rank's micro-batches of any global batch.

A global batch is the next G samples of a set's order, where G is its size. Each micro-batch takes the next
micro batch size x ranks of them, and rank r the r-th slice of those (Megatron's rule). Which samples a step sees thus
depends on nothing but the number of samples consumed before it: that number is the whole state of the loader. Document
ids and positions travel with the tokens, so that attention never has to guess borders from token values.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ds.config.blend import parse_blend
from megatron_ds.config.schema import DataConfig
from megatron_ds.data.blend import Blend
from megatron_ds.data.indexed import IndexedDataset, check_token_ids
from megatron_ds.data.samples import Sample, SampleIndex, split_documents
from megatron_ds.errors import ConfigError, DataError

EVALUATION_SEED = 0
"""Evaluation order is the same for every training seed, so that runs can be compared."""
CACHE_FOLDER = "index_cache"
PARTS = ("training", "validation", "test")
"""What the shares of data.split are for."""


@dataclass(frozen=True)
class Batch:
    """B sequences of S inputs and targets."""

    token_BS: Tensor
    """int64: input ids."""
    label_BS: Tensor
    """int64: the id that follows each input."""
    counted_BS: Tensor
    """bool: targets that enter the loss."""
    document_BS: Tensor
    """int64: 0, 1, 2 ... within a sequence; inputs with equal ids belong to one document."""
    position_BS: Tensor
    """int64: position within the document's piece; 0 at each document's first token."""

    @property
    def num_counted(self) -> int:
        """Number of targets that enter the loss."""
        return int(self.counted_BS.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class TokenDataset:
    """A blend of corpora as an endless sequence of samples."""

    num_samples: int | None = None
    """Number of samples; None if it is endless."""

    def __init__(self, indices: Sequence[SampleIndex], blend: Blend, uncounted_input_id: int | None = None) -> None:
        self.indices = list(indices)
        self.blend = blend
        self.uncounted_input_id = uncounted_input_id
        """Inputs with this id have no counted target (data.eod_mask_loss)."""

    @property
    def seq_length(self) -> int:
        """Inputs in a sample."""
        return self.indices[0].seq_length

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token of the blend, None if a corpus does not know them.

        Bits per byte = loss in nats per token / ln 2 / bytes per token.
        """
        values = [index.bytes_per_token for index in self.indices]
        return None if None in values else float(np.dot(self.blend.shares, values))

    def __getitem__(self, k: int) -> Sample:
        dataset, sample = self.blend.locate(k)
        return self.indices[int(dataset)][int(sample)]

    def sample_ids(self, consumed_samples: int, count: int) -> list[str]:
        """Names (``prefix:document:offset``) of ``count`` samples, in order, after the first ``consumed_samples``."""
        return [self[k].name for k in range(consumed_samples, consumed_samples + count)]


class EvalDataset(TokenDataset):
    """A blend of corpora as a finite set: one corpus is taken whole, tail included.

    A blend of several ends where the first of them has no sample left, so that their shares hold.
    """

    num_samples: int

    def __init__(self, indices: Sequence[SampleIndex], blend: Blend, uncounted_input_id: int | None = None) -> None:
        super().__init__(indices, blend, uncounted_input_id)
        self.num_samples = blend.length([len(index) for index in indices])

    def __len__(self) -> int:
        return self.num_samples


@dataclass(frozen=True)
class Datasets:
    """The sets of a run."""

    train: TokenDataset | None
    """Endless; None if data.split gives training no share."""
    eval: dict[str, EvalDataset]
    """By name; empty if data.split gives validation no share."""
    test: EvalDataset | None
    """None if data.split gives test no text."""


def build_datasets(data: DataConfig, *, seed: int, seq_length: int, vocab_size: int, eod_id: int | None) -> Datasets:
    """Open, check and split all corpora of a run.

    ``vocab_size`` is the true vocabulary, to which all ids must belong. Raises DataError for corpora that are missing,
    damaged or too short, ConfigError for a bad blend or split.
    """
    if data.eod_mask_loss and eod_id is None:
        raise ConfigError("data.eod_mask_loss needs an end-of-document id; set data.tokenizer or data.eod_id")
    builder = _Builder(data, seq_length, vocab_size, uncounted_input_id=eod_id if data.eod_mask_loss else None)
    # Of a corpus this large, only a share of zero gives no document.
    wanted = [bool(documents) for documents in split_documents(data.split, 1 << 50)]
    train = builder.build(data.data_path, part="training", seed=seed) if wanted[0] else None
    test = builder.build(data.data_path, part="test") if wanted[2] else None
    named = {name: builder.build(words) for name, words in data.eval_data_path.items()}
    if not named and wanted[1]:
        named = {"valid": builder.build(data.data_path, part="validation")}
    return Datasets(train, named, test)


class _Builder:
    """Builds the sets of a run; opens and checks each corpus once."""

    def __init__(self, data: DataConfig, seq_length: int, vocab_size: int, uncounted_input_id: int | None) -> None:
        self.data = data
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.uncounted_input_id = uncounted_input_id
        self._opened: dict[str, IndexedDataset] = {}

    def build(self, words: Sequence[str], *, part: str | None = None, seed: int | None = None) -> TokenDataset | None:
        """A blend of one part of its corpora (all of them without ``part``): for training with a seed, else a set."""
        prefixes, weights = parse_blend(words)
        indices = []
        for dataset in map(self._open, prefixes):
            documents = self._documents(dataset, part)
            first, last = dataset.document_offsets[[documents.start, documents.stop]]
            if part == "test" and last - first < 2:
                return None  # the smallest share, and one that training can do without
            if not documents:
                raise DataError(
                    f"{dataset.prefix}: split {self.data.split} leaves none of {dataset.num_documents} documents for "
                    f"{part}; cut the text into more documents, or set data.split (100 trains without validation)"
                )
            index = SampleIndex(
                dataset,
                documents,
                self.seq_length,
                EVALUATION_SEED if seed is None else seed,
                cache_dir=self._cache_dir(dataset.prefix),
                keep_tail=seed is None,
            )
            indices.append(index)
        blend = Blend(weights or [len(index) for index in indices])
        return (EvalDataset if seed is None else TokenDataset)(indices, blend, self.uncounted_input_id)

    def _documents(self, dataset: IndexedDataset, part: str | None) -> range:
        if part is None:
            return range(dataset.num_documents)
        return split_documents(self.data.split, dataset.num_documents)[PARTS.index(part)]

    def _open(self, prefix: str) -> IndexedDataset:
        if prefix not in self._opened:
            dataset = IndexedDataset(prefix)
            check_token_ids(dataset, self.vocab_size, self._cache_dir(prefix))
            self._opened[prefix] = dataset
        return self._opened[prefix]

    def _cache_dir(self, prefix: str) -> Path:
        path = self.data.data_cache_path
        return Path(path) if path else Path(prefix).parent / CACHE_FOLDER


class BatchLoader:
    """One rank's micro-batches of every global batch; the next global batch is built in a background thread.

    It is rank ``data_rank`` of ``data_size`` data-parallel ranks; ranks with one data rank (a pipeline, tensor-parallel
    ranks) read the same batches. A global batch has micro_batch_size x number of micro-batches x data_size samples, and
    that number may change: a micro-batch depends only on the samples consumed before its global batch, and on its place
    in it. Beyond the end of a finite set come sequences without counted targets.
    """

    def __init__(self, dataset: TokenDataset, micro_batch_size: int, data_rank: int, data_size: int) -> None:
        assert 0 <= data_rank < data_size, f"rank {data_rank} of {data_size}"
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        # One thread: it alone touches the dataset, so a call out of order waits for the prefetch instead of racing it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch_loader")
        self._prefetched: tuple[int, Future[list[Batch]]] | None = None

    def micro_batch_samples(self, consumed_samples: int, micro_batch: int) -> range:
        """Numbers of this rank's samples in one micro-batch of the global batch after ``consumed_samples``."""
        slice_number = micro_batch * self.data_size + self.data_rank
        start = consumed_samples + slice_number * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def global_batch(self, consumed_samples: int, num_micro_batches: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at sample ``consumed_samples``."""
        batches: list[Batch] = []
        if self._prefetched and self._prefetched[0] == consumed_samples:
            batches = self._prefetched[1].result()[:num_micro_batches]
        missing = range(len(batches), num_micro_batches)
        if missing:
            batches += self._thread.submit(self._build, consumed_samples, missing).result()
        following = consumed_samples + self.micro_batch_size * num_micro_batches * self.data_size
        # As many as now: where the next global batch has more, the rest is built when it is asked for.
        self._prefetched = (following, self._thread.submit(self._build, following, range(num_micro_batches)))
        return batches

    def close(self) -> None:
        """Stop the thread; the loader cannot be used any more. May be called twice."""
        self._thread.shutdown(cancel_futures=True)

    def _build(self, consumed_samples: int, micro_batches: range) -> list[Batch]:
        return [self._collate(self.micro_batch_samples(consumed_samples, m)) for m in micro_batches]

    def _collate(self, numbers: range) -> Batch:
        dataset, end = self.dataset, self.dataset.num_samples
        samples = [dataset[k] if end is None or k < end else None for k in numbers]
        return collate(samples, dataset.seq_length, dataset.uncounted_input_id)


def collate(samples: Sequence[Sample | None], seq_length: int, uncounted_input_id: int | None = None) -> Batch:
    """Put samples into one batch; a short sample is padded with a document of zeros, None gives only padding.

    A target is counted unless it is padding or its input is ``uncounted_input_id``. The first token of a document is
    a target, too: that of the last token of the document before it.
    """
    shape = len(samples), seq_length + 1
    token_BS1 = np.zeros(shape, np.int64)
    document_BS1 = np.zeros(shape, np.int64)
    counted_BS = np.zeros((len(samples), seq_length), bool)
    for row, sample in enumerate(samples):
        if sample is not None:
            length = len(sample.token_S1)
            token_BS1[row, :length] = sample.token_S1
            document_BS1[row, :length] = sample.document_S1
            document_BS1[row, length:] = len(sample.where)
            counted_BS[row, : length - 1] = True
    token_BS, document_BS = token_BS1[:, :-1], document_BS1[:, :-1]
    if uncounted_input_id is not None:
        counted_BS &= token_BS != uncounted_input_id
    step_S = np.arange(seq_length)
    is_first_BS = np.diff(document_BS, prepend=-1) != 0
    position_BS = step_S - np.maximum.accumulate(np.where(is_first_BS, step_S, 0), axis=1)
    arrays = (token_BS, token_BS1[:, 1:], counted_BS, document_BS, position_BS)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
