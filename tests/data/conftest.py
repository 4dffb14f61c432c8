"""Small corpora and a small tokenizer for the tests of the data part."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.indexed import CorpusMeta, IndexedDatasetBuilder
from megatron_ds.data.tokenizer import Tokenizer, train_bpe

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "def main(argv):\n    for number in range(10):\n        print(number)\n" * 20,
    "Grüße aus Köln, 12345 mal: 漢字 and \N{GRINNING FACE}\r\n\t tabs. " * 10,
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with a byte-level BPE of a few hundred ids."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 340).save(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture
def make_corpus(tmp_path):
    """Write documents (lists of ids) as the pair ``name``; the prefix. With ``meta``, checksums and text bytes too."""

    def make(documents, name="corpus", dtype=np.uint16, meta=False, vocab_size=100) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetBuilder(prefix, dtype) as builder:
            for document in documents:
                builder.add_document(document)
            crcs = builder.finalize()
        if meta:
            sizes = np.array([3 * len(document) for document in documents], np.int64)
            np.save(f"{prefix}.bytes.npy", sizes)
            tokens = sum(map(len, documents))
            CorpusMeta(len(documents), tokens, int(sizes.sum()), vocab_size, True, *crcs).write(prefix)
            assert crcs == tuple(zlib.crc32(Path(prefix + suffix).read_bytes()) for suffix in (".bin", ".idx"))
        return prefix

    return make


@pytest.fixture
def random_documents():
    """``count`` documents of 0 to 40 ids, with an id of its own for every token as far as the type allows."""

    def make(count, seed=0, longest=40):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(0, longest + 1, count)
        ids = np.arange(lengths.sum()) % 60000
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    return make
