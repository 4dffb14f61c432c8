"""Batches: Megatron's slice rule, the same samples for any number of ranks and any length, every eval token once."""

import threading

import numpy as np
import pytest
import torch

from megatron_ds.config.schema import DataConfig
from megatron_ds.data import loader as loader_module
from megatron_ds.data.loader import Batch, BatchLoader, build_datasets, collate
from megatron_ds.data.samples import Sample, Span
from megatron_ds.errors import ConfigError, DataError

SEQ = 8
EOD = 99


@pytest.fixture
def corpora(make_corpus):
    """Two corpora whose documents end with EOD; a and b differ in size and in the ids they use."""
    generator = np.random.default_rng(0)

    def documents(count, low, high):
        return [[*generator.integers(low, high, generator.integers(1, 20)).tolist(), EOD] for _ in range(count)]

    return make_corpus(documents(50, 1, 40), "a", meta=True), make_corpus(documents(90, 50, 90), "b", meta=True)


def build(*words, seed=1, vocab_size=100, eod_id=EOD, seq_length=SEQ, **data):
    return build_datasets(
        DataConfig(data_path=words, **data), seed=seed, seq_length=seq_length, vocab_size=vocab_size, eod_id=eod_id
    )


def make_loader(dataset, micro=2, rank=0, size=1):
    return BatchLoader(dataset, micro_batch_size=micro, data_rank=rank, data_size=size)


def equal(a: Batch, b: Batch):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


# --- one batch ------------------------------------------------------------------------------------------------------


def slow_collate(samples, seq_length, uncounted):
    """Every field, token by token."""
    rows = []
    for sample in samples:
        tokens, documents = (sample.token_S1.tolist(), sample.document_S1.tolist()) if sample else ([], [])
        row = []
        for i in range(seq_length):
            token = tokens[i] if i < len(tokens) else 0
            label = tokens[i + 1] if i + 1 < len(tokens) else 0
            counted = i + 1 < len(tokens) and token != uncounted
            document = documents[i] if i < len(tokens) else documents[-1] + 1 if documents else 0
            position = 0 if i == 0 or document != row[-1][3] else row[-1][4] + 1
            row.append((token, label, counted, document, position))
        rows.append(row)
    return [[[cell[field] for cell in row] for row in rows] for field in range(5)]


@pytest.mark.parametrize("uncounted", [None, EOD])
def test_batch_equals_the_slow_one(corpora, uncounted):
    datasets = build(corpora[0])
    index = datasets.eval["valid"].indices[0]
    samples = [*(index[k] for k in range(len(index))), None]
    assert any(len(sample.token_S1) <= SEQ for sample in samples if sample)
    batch = collate(samples, SEQ, uncounted)
    assert [field.tolist() for field in vars(batch).values()] == slow_collate(samples, SEQ, uncounted)
    assert [field.dtype for field in vars(batch).values()] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    assert batch.num_counted == sum(map(sum, slow_collate(samples, SEQ, uncounted)[2]))
    assert equal(batch.to("cpu"), batch)


def test_targets_across_a_border():
    """The first token of the next document is a target of the last one, unless eod inputs are left out."""
    token = np.array([5, EOD, 7, 8, EOD])
    sample = Sample(token, np.array([0, 0, 1, 1, 1]), (Span(3, 0, 2), Span(4, 0, 3)), "corpus")
    batch = collate([sample], 4)
    assert batch.token_BS.tolist() == [[5, EOD, 7, 8]] and batch.label_BS.tolist() == [[EOD, 7, 8, EOD]]
    assert batch.document_BS.tolist() == [[0, 0, 1, 1]] and batch.position_BS.tolist() == [[0, 1, 0, 1]]
    assert batch.counted_BS.tolist() == [[True] * 4]
    assert collate([sample], 4, EOD).counted_BS.tolist() == [[True, False, True, True]]


# --- order ----------------------------------------------------------------------------------------------------------


def test_first_samples_do_not_depend_on_ranks_or_on_length(corpora):
    """The global batch is the same set of sequences for any micro batch size and number of ranks."""
    words, count = ("0.3", corpora[0], "0.7", corpora[1]), 48
    reference = build(*words).train
    ids = reference.sample_ids(0, 2 * count)
    assert ids[:count] == build(*words).train.sample_ids(0, count)
    assert ids[17:60] == build(*words).train.sample_ids(17, 43)
    assert ids != build(*words, seed=2).train.sample_ids(0, 2 * count)
    rows = [reference[k].token_S1[:-1].tolist() for k in range(count)]
    for micro, steps, size in ((12, 1, 1), (3, 4, 1), (3, 2, 2), (1, 3, 4), (6, 1, 2)):
        loaders = [make_loader(build(*words).train, micro, rank, size) for rank in range(size)]
        for consumed in range(0, count, 12):
            batches = [loader.global_batch(consumed, steps) for loader in loaders]
            seen = [
                row for step in range(steps) for rank in range(size) for row in batches[rank][step].token_BS.tolist()
            ]
            assert seen == rows[consumed : consumed + 12]
        for loader in loaders:
            loader.close()


def test_megatrons_slices():
    loader = make_loader(None, micro=2, rank=1, size=4)
    assert [list(loader.micro_batch_samples(100, m)) for m in range(3)] == [[102, 103], [110, 111], [118, 119]]
    loader.close()


def test_global_batch_is_pure(corpora):
    """In order (prefetched), repeated, out of order, longer and shorter: the answer is that of a fresh loader."""
    train = build(corpora[0]).train
    loader = make_loader(train)
    for consumed, steps in ((0, 3), (6, 3), (12, 5), (22, 5), (32, 2), (12, 3), (600, 3), (6, 1), (0, 3), (12, 3)):
        fresh = make_loader(train)
        expected = fresh.global_batch(consumed, steps)
        fresh.close()
        got = loader.global_batch(consumed, steps)
        assert len(got) == steps and all(map(equal, got, expected))
    loader.close()
    loader.close()


def test_the_next_batch_is_built_in_one_background_thread(corpora):
    train, built = build(corpora[0]).train, []

    class Recording:
        num_samples, seq_length, uncounted_input_id = None, SEQ, None

        def __getitem__(self, k):
            built.append((k, threading.current_thread().name))
            return train[k]

    before = threading.active_count()
    loader = make_loader(Recording())
    loader.global_batch(0, 3)
    loader.global_batch(6, 3)
    loader.close()
    assert [k for k, _ in built][:12] == list(range(12))
    assert len({name for _, name in built}) == 1 and "batch_loader" in built[0][1]
    assert threading.active_count() == before


def test_errors_of_the_background_thread_come_out(corpora):
    class Broken:
        num_samples, seq_length, uncounted_input_id = None, SEQ, None

        def __getitem__(self, k):
            raise DataError(f"sample {k}")

    loader = make_loader(Broken())
    with pytest.raises(DataError, match="sample 0"):
        loader.global_batch(0, 1)
    loader.close()


# --- sets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_evaluation_counts_every_target_once(corpora, size):
    dataset = build(corpora[1], split="50,45,5").eval["valid"]
    (index,) = dataset.indices
    assert len(dataset) == len(index) and (index.num_tokens - 1) % SEQ, "the set should have a tail"
    targets = []
    for rank in range(size):
        loader, global_batch = make_loader(dataset, 2, rank, size), 2 * 2 * size
        assert len(dataset) % global_batch, "the last global batch should be incomplete"
        for step in range(-(-len(dataset) // global_batch)):
            for batch in loader.global_batch(step * global_batch, 2):
                targets += batch.label_BS[batch.counted_BS].tolist()
        loader.close()
    stream = [t for d in index.documents for t in index.dataset.document(d).tolist()]
    first = index.dataset.document(dataset.indices[0].documents.start + int(index._build(0).documents[0]))[0]
    assert sorted([*targets, int(first)]) == sorted(stream)


def test_sets_are_disjoint_and_evaluation_ignores_the_seed(corpora):
    one, two = (build(corpora[1], seed=seed, split="80,15,5") for seed in (1, 2))
    parts = [one.train.indices[0], one.eval["valid"].indices[0], one.test.indices[0]]
    assert [index.documents for index in parts] == [range(72), range(72, 86), range(86, 90)]
    for a, b in ((one.eval["valid"], two.eval["valid"]), (one.test, two.test)):
        assert a.sample_ids(0, len(a)) == b.sample_ids(0, len(b))


def test_named_sets_take_whole_corpora(corpora):
    named = {"first": (corpora[0],), "mix": ("0.5", corpora[0], "0.5", corpora[1]), "all": corpora}
    datasets = build(corpora[0], eval_data_path=named)
    assert list(datasets.eval) == ["first", "mix", "all"]
    first, mix, everything = datasets.eval.values()
    assert first.indices[0].documents == range(50)
    assert len(mix) in (2 * len(first), 2 * len(first) + 1), "ends where the smaller corpus ends"
    assert len(everything) == sum(len(index) for index in everything.indices)
    assert datasets.train.indices[0].documents == range(48)


def test_parts_without_documents(corpora, make_corpus):
    only_train = build(corpora[0], split="100")
    assert only_train.eval == {} and only_train.test is None and only_train.train.num_samples is None
    only_test = build(corpora[0], split="0,0,1")
    assert only_test.train is None and len(only_test.test) == len(only_test.test.indices[0])
    assert build(corpora[0], split="900,99,1").test is None
    assert build(make_corpus([[1] * 20] * 9 + [[]], "empty_end"), split="8,1,1").test is None
    with pytest.raises(
        DataError, match=r"split 9990,10 leaves none of 50 documents for validation.*data\.split \(100 "
    ):
        build(corpora[0], split="9990,10")


def test_blend_without_weights_goes_by_size(corpora):
    train = build(*corpora).train
    sizes = np.array([len(index) for index in train.indices])
    assert np.allclose(train.blend.shares, sizes / sizes.sum())
    sources = [train[k].source for k in range(sizes.sum())]
    assert [sources.count(prefix) for prefix in corpora] == sizes.tolist()


def test_bytes_per_token(corpora, make_corpus):
    datasets = build("0.3", corpora[0], "0.7", corpora[1])
    assert datasets.train.bytes_per_token == pytest.approx(3.0)
    np.save(f"{corpora[0]}.bytes.npy", np.full(50, 10))
    datasets = build("0.3", corpora[0], "0.7", corpora[1])
    index = datasets.train.indices[0]
    assert datasets.train.bytes_per_token == pytest.approx(0.3 * 10 * len(index.documents) / index.num_tokens + 0.7 * 3)
    foreign = make_corpus([[1, 2, 3] * 9] * 20, "foreign")
    assert build("0.5", corpora[0], "0.5", foreign).train.bytes_per_token is None


# --- what stops a run before its first step -------------------------------------------------------------------------


def test_each_corpus_is_checked_once(corpora, monkeypatch):
    checked, check = [], loader_module.check_token_ids
    monkeypatch.setattr(loader_module, "check_token_ids", lambda d, *rest: checked.append(d.prefix) or check(d, *rest))
    build(*corpora, eval_data_path={"a": (corpora[0],)})
    assert checked == list(corpora)


def test_ids_beyond_the_vocabulary(corpora):
    with pytest.raises(DataError, match=rf"{corpora[0]}\.bin: token .* is 99, but the vocabulary has 99 ids"):
        build(corpora[0], vocab_size=99)


def test_damage_and_absence(corpora, tmp_path):
    with pytest.raises(DataError, match=r"c\.idx: cannot be read"):
        build(str(tmp_path / "c"))
    with open(f"{corpora[0]}.bin", "ab") as file:
        file.write(b"\x00\x00")
    with pytest.raises(DataError, match=r"a\.bin: has .* bytes"):
        build(corpora[0])


def test_too_little_text(corpora):
    with pytest.raises(DataError, match=r"a sample needs 1001; give more text, another data\.split or a shorter"):
        build(corpora[0], seq_length=1000)


def test_masking_needs_an_end_of_document(corpora):
    with pytest.raises(ConfigError, match=r"data\.eod_mask_loss needs an end-of-document id"):
        build(corpora[0], eod_id=None, eod_mask_loss=True)
    masked = build(corpora[0], eod_mask_loss=True).train
    loader = make_loader(masked)
    batch = loader.global_batch(0, 1)[0]
    loader.close()
    assert torch.equal(batch.counted_BS, batch.token_BS != EOD) and not batch.counted_BS.all()


def test_cache_folder(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ds.data.samples.CACHE_FROM", 1)
    build(corpora[0]).train[0]
    assert (tmp_path / "index_cache").is_dir()
    build(corpora[0], data_cache_path=str(tmp_path / "elsewhere")).train[0]
    assert (tmp_path / "elsewhere").is_dir()
