"""The corpus of the standard library: the same file every time, both kinds mixed, of the size asked for."""

import json

import pytest

from megatron_ds.data.corpus import write_stdlib_corpus
from megatron_ds.errors import DataError


def test_the_corpus_is_deterministic_and_has_the_size(tmp_path):
    first, second = (write_stdlib_corpus(tmp_path / name, megabytes=2.0) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    assert 2e6 <= sum(len(row["text"].encode()) for row in rows) < 2.4e6
    sources = [row["source"] for row in rows]
    assert len(set(sources)) == len(sources) and "with" in sources
    kinds = [source.endswith(".py") for source in sources]
    assert 0 < sum(kinds[-40:]) < 40, "a share at the end is mixed like the rest"
    assert not any(source.startswith(("encodings/", "site-packages/", "pydoc_data/")) for source in sources)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_stdlib_corpus(tmp_path / "file", megabytes=0.01)
