"""The .bin/.idx pair: byte-exact, interchangeable with megatron-core, and every kind of damage named."""

import logging
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import indexed
from megatron_ds.data.indexed import (
    CorpusMeta,
    IndexedDataset,
    IndexedDatasetBuilder,
    check_token_ids,
    optimal_dtype,
)
from megatron_ds.errors import DataError

GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0400")
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800 00"  # magic
    "0100000000000000 08"  # version, uint16
    "0200000000000000 0300000000000000"  # sequences, document borders
    "03000000 01000000"  # lengths
    "0000000000000000 0600000000000000"  # pointers
    "0000000000000000 0100000000000000 0200000000000000"  # documents
)


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's module, which complains about missing CUDA extensions when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    logging.getLogger("megatron").setLevel(logging.ERROR)
    return indexed_dataset


def documents_of(dataset):
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def test_golden_vector(make_corpus):
    prefix = make_corpus([[1, 2, 3], [4]])
    assert Path(f"{prefix}.bin").read_bytes() == GOLDEN_BIN
    assert Path(f"{prefix}.idx").read_bytes() == GOLDEN_IDX and len(GOLDEN_IDX) == 82


def test_empty_corpus_has_42_bytes(make_corpus):
    prefix = make_corpus([])
    assert os.path.getsize(f"{prefix}.idx") == 42
    dataset = IndexedDataset(prefix)
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16, np.int64])
def test_interchange_with_megatron_core(megatron, tmp_path, dtype):
    """Documents of several sequences, and empty ones: the same bytes, and each side reads the other's."""
    generator = np.random.default_rng(3)
    documents = []
    for _ in range(37):
        lengths = generator.integers(1, 9, generator.integers(0, 4)).tolist()
        documents.append((generator.integers(0, 200, sum(lengths)), lengths))
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    with IndexedDatasetBuilder(ours, dtype) as builder:
        for tokens, lengths in documents:
            builder.add_document(tokens, lengths)
        builder.finalize()
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for tokens, lengths in documents:
        builder.add_document(tokens, lengths)
    builder.finalize(f"{theirs}.idx")
    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()

    reader, dataset = megatron.IndexedDataset(ours), IndexedDataset(theirs)
    assert len(reader) == len(dataset)
    assert dataset.dtype == dtype
    assert np.array_equal(reader.document_indices, dataset.document_indices)
    assert np.array_equal(reader.sequence_lengths, dataset.lengths)
    for sequence in range(len(dataset)):
        assert np.array_equal(reader[sequence], dataset.get(sequence))
        assert np.array_equal(reader.get(sequence, offset=1), dataset.get(sequence, 1))
        length = int(dataset.lengths[sequence]) - 1
        assert np.array_equal(reader.get(sequence, offset=0, length=length), dataset.get(sequence, 0, length))
    assert documents_of(dataset) == [tokens.tolist() for tokens, _ in documents]


@pytest.mark.parametrize("vocab_size", [1, 257, 65499, 65500, 65536, 128256])
def test_dtype_is_megatrons_choice(megatron, vocab_size):
    assert optimal_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_bulk_equals_one_by_one(make_corpus, random_documents, tmp_path):
    documents = random_documents(50)
    prefix, bulk = make_corpus(documents), str(tmp_path / "bulk")
    with IndexedDatasetBuilder(bulk, np.uint16) as builder:
        for part in (documents[:20], documents[20:]):
            tokens = np.array([token for document in part for token in document], np.uint16)
            builder.add_documents(tokens, np.array([len(document) for document in part]))
        builder.finalize()
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == Path(bulk + suffix).read_bytes()


def test_merge_equals_writing_at_once(make_corpus, random_documents, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "CHUNK_TOKENS", 7)
    first, second = random_documents(11, seed=1), random_documents(8, seed=2)
    whole, a, b = (make_corpus(d, n) for d, n in ((first + second, "whole"), (first, "a"), (second, "b")))
    merged = str(tmp_path / "merged")
    with IndexedDatasetBuilder(merged, np.uint16) as builder:
        builder.add_index(a)
        builder.add_index(b)
        builder.finalize()
    for suffix in (".bin", ".idx"):
        assert Path(whole + suffix).read_bytes() == Path(merged + suffix).read_bytes()
    with IndexedDatasetBuilder(merged, np.int32) as builder, pytest.raises(DataError, match=r"uint16.*int32"):
        builder.add_index(a)


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_that_do_not_fit_are_refused(tmp_path, token):
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder, pytest.raises(DataError, match="do not fit"):
        builder.add_document([1, token])


# --- nothing half-written -------------------------------------------------------------------------------------------


def test_an_error_leaves_the_old_pair_and_no_other_file(make_corpus, tmp_path):
    prefix = make_corpus([[1, 2]])
    with pytest.raises(KeyError), IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_document([3])
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]
    assert documents_of(IndexedDataset(prefix)) == [[1, 2]]


def test_a_killed_writer_leaves_no_corpus(tmp_path):
    script = (
        "import os, signal, sys, numpy as np\n"
        "from megatron_ds.data.indexed import IndexedDatasetBuilder\n"
        "with IndexedDatasetBuilder(sys.argv[1], np.uint16) as builder:\n"
        "    builder.add_document(np.arange(60000, dtype=np.uint16))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")]).returncode == -9
    assert not (tmp_path / "c.bin").exists() and not (tmp_path / "c.idx").exists()


@pytest.mark.parametrize("survived", [0, 1])
def test_death_between_the_renames_leaves_no_mixed_pair(make_corpus, tmp_path, monkeypatch, survived):
    prefix = make_corpus([[1, 2]], meta=True)
    replace, calls = os.replace, []

    def dying_replace(source, target):
        if len(calls) == survived:
            raise InterruptedError
        calls.append(target)
        replace(source, target)

    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_document([3, 4])
        monkeypatch.setattr(os, "replace", dying_replace)
        with pytest.raises(InterruptedError):
            builder.finalize()
    with pytest.raises(DataError, match=r"corpus\.idx: cannot be read"):
        IndexedDataset(prefix)


# --- damage ---------------------------------------------------------------------------------------------------------


def rewrite(path, position, data):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


DAMAGE = {
    "magic": (0, b"X", "does not begin with Megatron's header"),
    "version": (9, b"\x02", "format version is 2"),
    "float64": (17, b"\x06", "dtype code 6 is a float"),
    "float32": (17, b"\x07", "dtype code 7 is a float"),
    "unknown type": (17, b"\x09", "dtype code 9 is none of"),
    "wider type": (17, b"\x04", "pointer of sequence 1 does not follow"),
    "sequences": (18, struct.pack("<Q", 3), r"3 sequences, 3 borders need 94"),
    "huge count": (18, b"\xff" * 8, "sequences"),
    "borders": (26, struct.pack("<Q", 0), "0 borders"),
    "negative length": (34, struct.pack("<i", -3), "sequence 0 has a negative length"),
    "length": (34, struct.pack("<i", 2), "pointer of sequence 1"),
    "last length": (38, struct.pack("<i", 7), r"corpus\.bin: has 8 bytes, but the index tells of 10 tokens"),
    "pointer": (50, struct.pack("<q", 4), "pointer of sequence 1"),
    "first border": (58, struct.pack("<q", 1), "documents span 1..2"),
    "last border": (74, struct.pack("<q", 3), "documents span 0..3, the sequences 0..2"),
    "order of borders": (66, struct.pack("<q", 9), "document 1 ends before it begins"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_the_index_is_named(make_corpus, name):
    position, data, message = DAMAGE[name]
    prefix = make_corpus([[1, 2, 3], [4]])
    rewrite(f"{prefix}.idx", position, data)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "corpus." in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("change", [-1, 1, -8, 8, None])
def test_wrong_sizes_are_named(make_corpus, suffix, change):
    prefix = make_corpus([[1, 2, 3], [4]])
    size = os.path.getsize(prefix + suffix)
    os.truncate(prefix + suffix, 0 if change is None else size + change)
    with pytest.raises(DataError, match=rf"corpus\{suffix}: (has|does not begin)"):
        IndexedDataset(prefix)


def test_a_multimodal_index_is_refused(make_corpus):
    prefix = make_corpus([[1, 2, 3], [4]])
    with open(f"{prefix}.idx", "ab") as file:
        file.write(b"\x00\x01")
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(prefix)


def test_missing_files_come_with_a_hint(make_corpus, tmp_path):
    prefix = make_corpus([[1]])
    with pytest.raises(DataError, match=r"leave out the suffix: .*corpus$"):
        IndexedDataset(f"{prefix}.bin")
    with pytest.raises(DataError, match=r"corpora in this folder: .*corpus"):
        IndexedDataset(tmp_path / "corpsu")
    with pytest.raises(DataError, match="prepare-data"):
        IndexedDataset(tmp_path / "nowhere" / "corpus")
    os.remove(f"{prefix}.bin")
    with pytest.raises(DataError, match=r"corpus\.bin: cannot be read"):
        IndexedDataset(prefix)


def mutate(data, generator):
    """The bytes with one of: a bit flipped, a byte set, a stretch cut out or doubled."""
    data, position = bytearray(data), int(generator.integers(len(data)))
    kind, length = generator.integers(4), int(generator.integers(1, 9))
    if kind == 0:
        data[position] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        data[position] = int(generator.integers(256))
    elif kind == 2:
        del data[position : position + length]
    else:
        data[position:position] = data[position : position + length]
    return bytes(data)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_random_damage_is_found_or_harmless(make_corpus, random_documents, suffix):
    """With the checksums of ``.meta.json`` every change is found; the two types that mean the same are harmless."""
    documents = random_documents(12, longest=6)
    prefix = make_corpus(documents, meta=True)
    original, generator, found = Path(prefix + suffix).read_bytes(), np.random.default_rng(5), 0
    for _ in range(500):
        Path(prefix + suffix).write_bytes(mutate(original, generator))
        try:
            dataset = IndexedDataset(prefix)
            check_token_ids(dataset, 100)
        except DataError as error:
            assert prefix in str(error)
            found += 1
        else:
            assert documents_of(dataset) == documents
    assert found > 450


def test_random_damage_of_a_foreign_index_never_changes_the_stream(make_corpus, random_documents):
    """Without checksums a border can move within the rules, but no token is lost, shifted or misread."""
    documents = random_documents(12, longest=6)
    prefix = make_corpus(documents)
    original, generator = Path(f"{prefix}.idx").read_bytes(), np.random.default_rng(6)
    stream = [token for document in documents for token in document]
    for _ in range(500):
        Path(f"{prefix}.idx").write_bytes(mutate(original, generator))
        try:
            dataset = IndexedDataset(prefix)
        except DataError:
            continue
        assert [token for document in documents_of(dataset) for token in document] == stream


# --- token ids ------------------------------------------------------------------------------------------------------


def test_the_first_id_beyond_the_vocabulary_is_named(make_corpus, monkeypatch):
    monkeypatch.setattr(indexed, "CHUNK_TOKENS", 4)
    dataset = IndexedDataset(make_corpus([[1, 2, 3], [], [4, 5, 99, 6], [98]]))
    check_token_ids(dataset, 100)
    with pytest.raises(DataError, match=r"token 2 of document 2 is 99, but the vocabulary has 99 ids"):
        check_token_ids(dataset, 99)


def test_negative_ids_are_named(make_corpus):
    dataset = IndexedDataset(make_corpus([[1, -7]], dtype=np.int32))
    with pytest.raises(DataError, match="token 1 of document 0 is -7"):
        check_token_ids(dataset, 100)


def test_the_result_of_a_long_scan_is_kept(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "CACHE_FROM_BYTES", 1)
    scans, scan = [], indexed._scan
    monkeypatch.setattr(indexed, "_scan", lambda dataset: scans.append(dataset) or scan(dataset))
    prefix, cache = make_corpus([[1, 2, 30]]), tmp_path / "cache"
    for _ in range(2):
        check_token_ids(IndexedDataset(prefix), 31, cache)
    assert len(scans) == 1
    with pytest.raises(DataError, match="token 2 of document 0 is 30"):
        check_token_ids(IndexedDataset(prefix), 30, cache)
    prefix = make_corpus([[1, 2, 40]])
    os.utime(f"{prefix}.bin", ns=(0, 1))
    check_token_ids(IndexedDataset(prefix), 41, cache)
    assert len(scans) == 2


def test_a_cache_that_cannot_be_written_says_what_to_set(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "CACHE_FROM_BYTES", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.data_cache_path"):
        check_token_ids(IndexedDataset(make_corpus([[1]])), 100, tmp_path / "file" / "cache")


# --- side files -----------------------------------------------------------------------------------------------------


def test_meta_round_trip_and_damage(make_corpus):
    prefix = make_corpus([[1, 2], [3]], meta=True)
    meta = CorpusMeta.read(prefix)
    assert (meta.documents, meta.tokens, meta.utf8_bytes, meta.bytes_per_token) == (2, 3, 9, 3.0)
    for damaged in ("{", "[]", '{"documents": 1}'):
        Path(f"{prefix}.meta.json").write_text(damaged)
        with pytest.raises(DataError, match=r"\.meta\.json: damaged"):
            CorpusMeta.read(prefix)


def test_text_bytes_belong_to_their_corpus(make_corpus):
    prefix = make_corpus([[1, 2], [3]], meta=True)
    assert IndexedDataset(prefix).text_bytes.tolist() == [6, 3]
    assert IndexedDataset(make_corpus([[1]], "foreign")).text_bytes is None
    np.save(f"{prefix}.bytes.npy", np.zeros(3, np.int64))
    with pytest.raises(DataError, match="belongs to another corpus"):
        _ = IndexedDataset(prefix).text_bytes
    Path(f"{prefix}.bytes.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="damaged"):
        _ = IndexedDataset(prefix).text_bytes
