"""Text files to corpora: every format, every bad line with its place, the same output for any number of workers."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from map_functions import die, slow_square

from megatron_ds.data import prepare as prepare_module
from megatron_ds.data import sources
from megatron_ds.data.indexed import CorpusMeta, IndexedDataset, optimal_dtype
from megatron_ds.data.prepare import EncodeJob, ordered_map, prepare
from megatron_ds.data.sources import BadRecord, BadRecords, find_inputs, parse, read_chunks, read_texts
from megatron_ds.errors import DataError

TEXTS = ["first document", "", "zweites Dokument\nmit 漢字 \x00 \N{GRINNING FACE}", "third <|endoftext|> document", " "]


def write_jsonl(path, texts=TEXTS, key="text"):
    path.write_bytes(b"".join(json.dumps({"id": i, key: t}).encode() + b"\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path, texts=TEXTS):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
    return path


def write_saved(path, texts=TEXTS):
    datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))}).save_to_disk(str(path))
    return path


def write_gz(path):
    data = write_jsonl(path.with_suffix(".tmp")).read_bytes()
    path.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    return path


def write_zst(path):
    data = write_jsonl(path.with_suffix(".tmp")).read_bytes()
    path.write_bytes(zstandard.compress(data[:50]) + zstandard.compress(data[50:]))
    return path


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.json.zst": write_zst,
    "a.parquet": write_parquet,
    "saved": write_saved,
}


def corpus_texts(prefix, tokenizer):
    """The documents of a corpus as text, without the end-of-document token."""
    dataset = IndexedDataset(prefix)
    documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert all(
        document[-1] == tokenizer.eod_id and tokenizer.eod_id not in document[:-1] for document in documents if document
    )
    return [tokenizer.decode(document[:-1]) for document in documents]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_corpus(tmp_path, tokenizer, tokenizer_dir, name):
    inputs = find_inputs([str(WRITERS[name](tmp_path / name))])
    (prepared,) = prepare(inputs, str(tmp_path / "out" / "c"), EncodeJob(str(tokenizer_dir)))
    assert corpus_texts(prepared.prefix, tokenizer) == TEXTS
    dataset = IndexedDataset(prepared.prefix)
    assert dataset.dtype == optimal_dtype(tokenizer.vocab_size)
    assert dataset.text_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    meta = CorpusMeta.read(prepared.prefix)
    assert meta == prepared.meta
    assert (meta.documents, meta.tokens) == (len(TEXTS), dataset.num_tokens)
    assert (meta.utf8_bytes, meta.vocab_size) == (sum(len(text.encode()) for text in TEXTS), tokenizer.vocab_size)
    assert f"{meta.tokens:,} tokens (uint16)" in str(prepared)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(tmp_path, tokenizer, tokenizer_dir, suffix):
    for i, text in enumerate(TEXTS):
        if text:
            compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(suffix).suffix, bytes)
            (tmp_path / f"{i}{suffix}").write_bytes(compress(text.encode()))
    (prepared,) = prepare(find_inputs([str(tmp_path)]), str(tmp_path / "c"), EncodeJob(str(tokenizer_dir)))
    assert corpus_texts(prepared.prefix, tokenizer) == [text for text in TEXTS if text]


def test_without_the_end_of_document_token(tmp_path, tokenizer, tokenizer_dir):
    job = EncodeJob(str(tokenizer_dir), append_eod=False)
    (prepared,) = prepare([write_jsonl(tmp_path / "a.jsonl")], str(tmp_path / "c"), job)
    dataset = IndexedDataset(prepared.prefix)
    assert [tokenizer.decode(dataset.document(i)) for i in range(len(TEXTS))] == TEXTS
    assert not prepared.meta.append_eod


def test_several_keys_give_several_corpora(tmp_path, tokenizer, tokenizer_dir):
    rows = [{"question": f"q{i}", "answer": f"the answer {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = EncodeJob(str(tokenizer_dir), ("question", "answer"))
    prepared = prepare([tmp_path / "a.jsonl"], str(tmp_path / "c"), job)
    assert [Path(p.prefix).name for p in prepared] == ["c_question_document", "c_answer_document"]
    assert corpus_texts(prepared[0].prefix, tokenizer) == [row["question"] for row in rows]
    assert corpus_texts(prepared[1].prefix, tokenizer) == [row["answer"] for row in rows]
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"b\.txt: a text file has no keys"):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.txt"], str(tmp_path / "d"), job)


def test_output_does_not_depend_on_workers(tmp_path, tokenizer_dir, monkeypatch):
    """Chunks of a few lines, more than can be in flight; bad lines are reported in order, too."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 200)
    lines = [json.dumps({"text": f"line {i} " * (i % 7)}) if i % 50 else "{" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    outputs = []
    for workers in (1, 2, 3):
        bad, prefix = BadRecords("skip", 1.0), str(tmp_path / f"c{workers}")
        prepare([tmp_path / "a.jsonl"], prefix, EncodeJob(str(tokenizer_dir)), workers=workers, bad=bad)
        suffixes = (".bin", ".idx", ".meta.json", ".bytes.npy")
        outputs.append([bad.count, *(Path(prefix + suffix).read_bytes() for suffix in suffixes)])
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0][0] == 6


def test_ordered_map_keeps_the_order_and_a_bounded_window():
    taken = []
    results = ordered_map(slow_square, (taken.append(x) or x for x in range(40)), workers=2)
    assert next(results) == 0
    assert len(taken) <= prepare_module.CHUNKS_PER_WORKER * 2 + 1
    assert list(results) == [x * x for x in range(1, 40)]


def test_a_worker_that_dies_is_reported():
    with pytest.raises(DataError, match=r"a worker process died.*fewer --workers"):
        list(ordered_map(die, range(3), workers=2))


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_are_found_in_a_fixed_order_each_once(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "sub/d.txt.gz", "notes.md", "tokenizer.json", "x.meta.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    write_saved(tmp_path / "saved")
    names = ["a.jsonl", "b.txt", "sub/c.parquet", "sub/d.txt.gz"]

    def found(*patterns):
        return [str(path.relative_to(tmp_path)) for path in find_inputs([str(tmp_path / p) for p in patterns])]

    assert found("sub", "a.jsonl", "b.txt") == ["sub/c.parquet", "sub/d.txt.gz", "a.jsonl", "b.txt"]
    assert found("*.txt", "b.txt", "a.jsonl") == ["b.txt", "a.jsonl"]
    assert found("**/*.parquet", "saved", "tokenizer.json") == ["sub/c.parquet", "saved", "tokenizer.json"]
    shutil.rmtree(tmp_path / "saved")
    assert found(".") == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.jsonl", "no such file"),
        ("*.zip", "no such file"),
        ("empty", "no such file"),
        ("a.md", "unknown format"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        find_inputs([str(tmp_path / name)])
    assert name in str(caught.value)


def test_a_dataset_dict_needs_a_split(tmp_path):
    split = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(DataError, match=r"has the splits train, test; name one, such as .*dict/train"):
        find_inputs([str(tmp_path / "dict")])
    assert find_inputs([str(tmp_path / "dict" / "train")]) == [tmp_path / "dict" / "train"]


def test_selected_rows_of_a_saved_dataset(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS}).select([3, 0])
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert list(read_texts([tmp_path / "saved"], ["text"], BadRecords(), "reading")) == [TEXTS[3], TEXTS[0]]


# --- bad lines ------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "truncated": (b'{"text": "abc', "invalid JSON, Unterminated string"),
    "empty object": (b"{}", "missing key 'text'; the line has none"),
    "other keys": (b'{"txt": "a", "id": 1}', "missing key 'text'; the line has 'txt', 'id'"),
    "utf-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "latin-1": ('{"text": "über"}'.encode("latin-1"), "invalid UTF-8 at byte 10"),
    "surrogate": (b'{"text": "\\ud800"}', "half a surrogate pair"),
    "number": (b'{"text": 5}', "'text' is int, not a string"),
    "null": (b'{"text": null}', "'text' is null, not a string"),
    "list": (b'{"text": ["a"]}', "'text' is list, not a string"),
    "array": (b'[{"text": "a"}]', "a JSON list, not an object; write one object per line"),
    "string": (b'"text"', "a JSON str, not an object"),
    "duplicate": (b'{"text": "a", "id": 1, "text": "b"}', "duplicate key 'text'"),
    "deep": (b'{"text": ' + b"[" * 100000 + b"]" * 100000 + b"}", "nested too deeply"),
    "digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "digits"),
    "two objects": (GOOD.strip() * 2, "invalid JSON, Extra data"),
    "binary": (b"\x1f\x8b\x08\x00", "invalid UTF-8 at byte 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_with_file_and_line(tmp_path, tokenizer_dir, capsys, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # the blank line counts, but is no error
    job = EncodeJob(str(tokenizer_dir))
    with pytest.raises(DataError) as caught:
        prepare([path], str(tmp_path / "c"), job)
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and "--on-bad-line skip" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]

    (prepared,) = prepare([path], str(tmp_path / "c"), job, bad=BadRecords("skip", 0.5))
    assert prepared.meta.documents == 2
    assert f"skipped {path}:3: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b'\xef\xbb\xbf{"text": "good"}', b'{"text": "good", "n": NaN}', b'  {"text": "good"} \r']
)
def test_harmless_oddities_are_read(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    assert list(read_texts([tmp_path / "a.jsonl"], ["text"], BadRecords(), "reading")) == ["good"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json.gz", "a.parquet"])
def test_empty_files_are_bad(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, pa.array([], pa.string()))
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(DataError, match=r":1: empty file"):
        list(read_texts([path], ["text"], BadRecords(), "reading"))


def test_lines_too_long_are_skipped_without_filling_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"x" * 5000 + b"\n" + GOOD + b"y" * 1001)
    records = [record for chunk in read_chunks(path, ["text"]) for record in parse(chunk, ["text"])]
    long = "longer than 0 MiB; cut it into several documents"
    assert records == [("good",), BadRecord(f"{path}:2", long), ("good",), BadRecord(f"{path}:4", long)]
    (tmp_path / "a.txt").write_bytes(b"x" * 1001)
    with pytest.raises(DataError, match="longer than"):
        list(read_texts([tmp_path / "a.txt"], ["text"], BadRecords(), "reading"))


def test_rows_of_tables_are_named_too(tmp_path):
    binary = pa.array([b"good", None, b"\xff"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    (chunk,) = read_chunks(tmp_path / "a.parquet", ["text"])
    place = tmp_path / "a.parquet"
    assert list(parse(chunk, ["text"])) == [
        ("good",),
        BadRecord(f"{place}:2", "'text' is null, not a string"),
        BadRecord(f"{place}:3", "invalid UTF-8 at byte 0"),
    ]


def test_columns_that_cannot_be_used(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'id' has type int64, not string"):
        list(read_chunks(path, ["id"]))
    with pytest.raises(DataError, match="has no column 'txt', only id, text"):
        list(read_chunks(path, ["txt"]))
    saved = write_saved(tmp_path / "saved")
    with pytest.raises(DataError, match="has no column 'txt', only text, id"):
        list(read_chunks(saved, ["txt"]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.parquet", "saved"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_files_are_named_even_when_skipping(tmp_path, name, damage):
    path = WRITERS[name](tmp_path / name)
    victim = next(path.glob("*.arrow")) if path.is_dir() else path
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\x00" * len(data))
    with pytest.raises(DataError) as caught:
        list(read_texts([path], ["text"], BadRecords("skip", 1.0), "reading"))
    assert str(path) in str(caught.value)


def test_skipping_has_a_cap(tmp_path, tokenizer_dir):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 999 + b"{\n")
    prepare([path], str(tmp_path / "c"), EncodeJob(str(tokenizer_dir)), bad=BadRecords("skip"))
    path.write_bytes(GOOD * 998 + b"{\n" * 2)
    before = (tmp_path / "c.idx").read_bytes()
    with pytest.raises(DataError, match=r"2 of 1,000 lines are bad, more than --max-bad-fraction 0\.001"):
        prepare([path], str(tmp_path / "c"), EncodeJob(str(tokenizer_dir)), bad=BadRecords("skip"))
    assert (tmp_path / "c.idx").read_bytes() == before


def test_many_bad_lines_do_not_flood_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "MAX_REPORTED", 3)
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 9 + GOOD)
    bad = BadRecords("skip", 1.0)
    assert list(read_texts([tmp_path / "a.jsonl"], ["text"], bad, "reading")) == ["good"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert bad.count == 9 and len(lines) == 4 and "further ones are only counted" in lines[-1]


def test_input_without_documents(tmp_path, tokenizer_dir):
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="the input has no document"):
        prepare([tmp_path / "a.jsonl"], str(tmp_path / "c"), EncodeJob(str(tokenizer_dir)))
    assert not list(tmp_path.glob("c*"))


# --- output ---------------------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(tmp_path, tokenizer_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare([write_jsonl(tmp_path / "a.jsonl")], str(tmp_path / "file" / "c"), EncodeJob(str(tokenizer_dir)))


def test_a_killed_run_leaves_no_half_pair_and_can_be_repeated(tmp_path, tokenizer, tokenizer_dir):
    """SIGKILL in the middle of the writing, then the same command again."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 50)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_ds.data import prepare, sources\n"
        "sources.CHUNK_BYTES = 500\n"
        "add, calls = prepare._CorpusWriter.add, []\n"
        "def dying_add(self, texts):\n"
        "    calls.append(texts)\n"
        "    add(self, texts)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare._CorpusWriter.add = dying_add\n"
        "prepare.prepare([Path(sys.argv[1])], sys.argv[2], prepare.EncodeJob(sys.argv[3]))\n"
    )
    prefix = str(tmp_path / "c")
    arguments = [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), prefix, str(tokenizer_dir)]
    assert subprocess.run(arguments).returncode == -9
    assert not Path(f"{prefix}.bin").exists() and not Path(f"{prefix}.idx").exists()
    prepare([tmp_path / "a.jsonl"], prefix, EncodeJob(str(tokenizer_dir)))
    assert corpus_texts(prefix, tokenizer) == TEXTS * 50


def test_progress_covers_all_bytes(tmp_path):
    for name, writer in WRITERS.items():
        path = writer(tmp_path / name)
        covered = sum(chunk.num_bytes for chunk in read_chunks(path, ["text"]))
        assert np.isclose(covered, sources.input_bytes(path), atol=2 * len(TEXTS)), name
