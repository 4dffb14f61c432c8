"""Sample order: a pure function of (seed, k), equal to a slow oracle, every token once per epoch, for ever the same."""

import logging
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import samples as samples_module
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.samples import SampleIndex, Span, split_documents
from megatron_ds.errors import ConfigError, DataError

SEQ = 7


@pytest.fixture
def dataset(make_corpus, random_documents):
    return IndexedDataset(make_corpus(random_documents(60)))


def megatrons_borders(lengths, seq_length):
    """Megatron's build_sample_idx, token by token: (place, offset) where each sample begins."""
    borders, place, offset = [(0, 0)], 0, 0
    for _ in range((sum(lengths) - 1) // seq_length):
        remaining = seq_length + 1
        while remaining:
            left = lengths[place] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                place, offset = place + 1, 0
        borders.append((place, offset))
    return borders


def oracle_epoch(index, epoch):
    """All samples of an epoch, in the order of visits, as lists of (document, offset, token)."""
    order = index._build(epoch)
    documents = [index.documents.start + int(d) for d in order.documents]
    lengths = [len(index.dataset.document(d)) for d in documents]
    stream = [(d, o, int(t)) for d in documents for o, t in enumerate(index.dataset.document(d))]
    starts = np.cumsum([0, *lengths])
    positions = [int(starts[place]) + offset for place, offset in megatrons_borders(lengths, index.seq_length)]
    return [stream[positions[j] : positions[j] + index.seq_length + 1] for j in order.order]


def flat(sample):
    """A sample in the oracle's form, from its spans and tokens."""
    places = [(span.document, span.offset + i) for span in sample.where for i in range(span.length)]
    return [(document, offset, int(token)) for (document, offset), token in zip(places, sample.token_S1, strict=True)]


@pytest.mark.parametrize("documents", [range(60), range(13, 41)])
@pytest.mark.parametrize("seq_length", [1, 7, 64])
def test_equals_megatrons_stream(dataset, documents, seq_length):
    index = SampleIndex(dataset, documents, seq_length, seed=3)
    expected = oracle_epoch(index, 0) + oracle_epoch(index, 1)
    assert len(expected) == 2 * len(index) == 2 * ((index.num_tokens - 1) // seq_length)
    for k, sample in enumerate(expected):
        assert flat(index[k]) == sample


def test_every_target_comes_once_per_epoch(dataset):
    index = SampleIndex(dataset, range(60), SEQ, seed=0)
    for epoch in range(3):
        rows = (flat(index[epoch * len(index) + i]) for i in range(len(index)))
        targets = [place for row in rows for place in row[1:]]
        assert len(set(targets)) == len(targets) == len(index) * SEQ


def test_a_kept_tail_completes_the_epoch(dataset):
    index = SampleIndex(dataset, range(60), SEQ, seed=0, keep_tail=True)
    assert (index.num_tokens - 1) % SEQ, "the corpus should leave a tail"
    rows = [flat(index[k]) for k in range(len(index))]
    assert sorted(map(len, rows))[:2] == [(index.num_tokens - 1) % SEQ + 1, SEQ + 1]
    assert len({place for row in rows for place in row[1:]}) == index.num_tokens - 1


def test_documents_are_numbered_within_the_sample(dataset):
    index = SampleIndex(dataset, range(60), 64, seed=0)
    for k in range(len(index)):
        sample = index[k]
        assert sample.token_S1.dtype == sample.document_S1.dtype == np.int64
        assert all(span.length for span in sample.where)
        lengths = [span.length for span in sample.where]
        assert sample.document_S1.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
        first = sample.where[0]
        assert sample.name == f"{dataset.prefix}:{first.document}:{first.offset}"


def test_any_order_of_access_gives_the_same(dataset):
    forward = SampleIndex(dataset, range(60), SEQ, seed=5)
    names = [forward[k].where for k in range(4 * len(forward))]
    jumping = SampleIndex(dataset, range(60), SEQ, seed=5)
    for k in np.random.default_rng(0).permutation(len(names)):
        assert jumping[int(k)].where == names[k]


def test_epochs_and_seeds_differ(dataset):
    index, other = (SampleIndex(dataset, range(60), SEQ, seed=seed) for seed in (1, 2))
    one, two = ([index[k].where for k in range(e * len(index), (e + 1) * len(index))] for e in (0, 1))
    assert one != two and one != [other[k].where for k in range(len(index))]


def test_the_order_never_changes(make_corpus):
    """Values of the first release: a run must resume in the same order under any version of numpy or of ours."""
    index = SampleIndex(IndexedDataset(make_corpus([list(range(9))] * 12)), range(12), 10, seed=1234)
    assert [index[k].where[0] for k in (0, 1, 9, 10, 123456789)] == [
        Span(9, 1, 8),
        Span(1, 4, 5),
        Span(3, 8, 1),
        Span(5, 4, 5),
        Span(9, 1, 8),
    ]


# --- cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch):
    monkeypatch.setattr(samples_module, "CACHE_FROM", 1)


def test_the_cache_holds_the_same_order(dataset, tmp_path, cached, monkeypatch):
    plain = SampleIndex(dataset, range(60), SEQ, seed=5)
    expected = [plain[k].where for k in range(3 * len(plain))]
    for _ in range(2):
        index = SampleIndex(dataset, range(60), SEQ, seed=5, cache_dir=tmp_path / "cache")
        assert [index[k].where for k in range(len(expected))] == expected
        # The second round must not build anything.
        monkeypatch.setattr(SampleIndex, "_build", None)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    epochs = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    assert epochs == ["epoch0", "epoch1", "epoch2"]


def test_what_makes_an_order_makes_a_cache_of_its_own(make_corpus, random_documents, tmp_path, cached):
    def folders():
        return {path for path in (tmp_path / "cache").iterdir() if path.is_dir()}

    seen = set()
    documents = random_documents(60)
    variants = [(documents, range(60), SEQ, 5), (documents, range(60), SEQ, 6), (documents, range(60), SEQ + 1, 5)]
    variants += [(documents, range(59), SEQ, 5), ([*documents[:-1], documents[-1] * 2], range(60), SEQ, 5)]
    for texts, part, seq_length, seed in variants:
        corpus = IndexedDataset(make_corpus(texts))
        _ = SampleIndex(corpus, part, seq_length, seed, cache_dir=tmp_path / "cache")[0]
        assert len(folders() - seen) == 1
        seen = folders()


def read_first(prefix, cache_dir, seed, queue):
    samples_module.CACHE_FROM = 1
    index = SampleIndex(IndexedDataset(prefix), range(60), SEQ, seed, cache_dir=Path(cache_dir))
    queue.put([index[k].where for k in range(20)])


def test_processes_share_one_cache(dataset, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (dataset.prefix, str(tmp_path / "cache"), 5, queue)
    processes = [context.Process(target=read_first, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    plain = SampleIndex(dataset, range(60), SEQ, seed=5)
    assert results == [[plain[k].where for k in range(20)]] * 4


def test_what_a_killed_builder_left_is_replaced(dataset, tmp_path, cached):
    index = SampleIndex(dataset, range(60), SEQ, seed=5, cache_dir=tmp_path / "cache")
    left = index._cache / "epoch0.tmp"
    left.mkdir(parents=True)
    (left / "documents.npy").write_text("half")
    assert index[0].where == SampleIndex(dataset, range(60), SEQ, seed=5)[0].where
    assert not left.exists()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_cache_is_named(dataset, tmp_path, cached, damage):
    index = SampleIndex(dataset, range(60), SEQ, seed=5, cache_dir=tmp_path / "cache")
    _ = index[0]
    path = index._cache / "epoch0" / "starts.npy"
    path.unlink() if damage is None else path.write_bytes(damage)
    again = SampleIndex(dataset, range(60), SEQ, seed=5, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"epoch0: damaged.*delete this folder"):
        _ = again[0]


# --- splits and errors ----------------------------------------------------------------------------------------------


def test_splits_are_megatrons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import blended_megatron_dataset_config as megatron
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for split in ("969,30,1", "969, 30, 1", "98,2", "1", "0,1,0", "1,0,1", "0.5,0.25,0.25", "1,1,1", "33.3,33.3,33.4"):
        matrix = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(split))
        for count in [*range(60), 999, 1000, 123457]:
            ranges = split_documents(split, count)
            assert len(ranges) == 3
            for ours, theirs in zip(ranges, matrix):
                if theirs is None:
                    assert not ours
                else:
                    assert ours == range(round(theirs[0] * float(count)), round(theirs[1] * float(count)))
            assert [d for part in ranges for d in part] == list(range(count))


@pytest.mark.parametrize("split", ["0,0", "", "a", "1,2,3,4", "1..2", "-1,2"])
def test_bad_splits(split):
    with pytest.raises(ConfigError):
        split_documents(split, 10)


def test_a_corpus_shorter_than_a_sample_is_named(make_corpus):
    dataset = IndexedDataset(make_corpus([[1, 2, 3], [4, 5], []]))
    message = r"corpus: 3 of its 3 documents hold 5 tokens, but a sample needs 6; give more text"
    with pytest.raises(DataError, match=message):
        SampleIndex(dataset, range(3), 5, seed=0)
    assert len(SampleIndex(dataset, range(3), 4, seed=0)) == 1
    assert len(SampleIndex(dataset, range(3), 5, seed=0, keep_tail=True)) == 1
    with pytest.raises(DataError, match="1 of its 3 documents hold 0 tokens, but a sample needs 2"):
        SampleIndex(dataset, range(2, 3), 5, seed=0, keep_tail=True)


def test_bytes_per_token_are_those_of_the_documents(make_corpus):
    dataset = IndexedDataset(make_corpus([[1] * 10, [2] * 5, [3] * 20], meta=True))
    np.save(f"{dataset.prefix}.bytes.npy", np.array([10, 20, 30]))
    assert SampleIndex(dataset, range(1, 3), 4, seed=0).bytes_per_token == 2.0
    assert SampleIndex(dataset, range(0, 1), 4, seed=0).bytes_per_token == 1.0
    foreign = IndexedDataset(make_corpus([[1] * 10], "foreign"))
    assert SampleIndex(foreign, range(1), 4, seed=0).bytes_per_token is None
