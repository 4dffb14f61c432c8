"""``train-tokenizer``, ``prepare-data`` and ``inspect-data`` as a user calls them."""

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_ds.cli.main import main
from megatron_ds.config.resolve import resolve
from megatron_ds.config.schema import RunConfig
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import ConfigError, DataError

TEXTS = [f"Document number {i}.\n\tIt says {i * 7919} and \x1b[31mred\u202e. " * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with raw.jsonl, a tokenizer ``tok`` and a corpus ``c`` made by the commands."""
    folder = tmp_path_factory.mktemp("data_commands")
    (folder / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    raw, tok = str(folder / "raw.jsonl"), str(folder / "tok")
    assert main(["train-tokenizer", "--input", raw, "--vocab-size", "300", "--output", tok]) == 0
    arguments = ["--input", raw, "--tokenizer", tok, "--output-prefix", str(folder / "c"), "--workers", "1"]
    assert main(["prepare-data", *arguments]) == 0
    return folder


@pytest.fixture
def inspect(folder, capsys, monkeypatch):
    """The output of ``inspect-data`` in that folder."""

    def call(*arguments):
        monkeypatch.chdir(folder)
        assert main(["inspect-data", *arguments]) == 0
        return capsys.readouterr().out

    return call


def test_commands_say_what_they_wrote(folder, capsys):
    raw, other = str(folder / "raw.jsonl"), str(folder / "other")
    main(["train-tokenizer", "--input", raw, "--vocab-size", "100000", "--output", other])
    assert re.search(
        r"other: \d+ ids \(100,000 were asked for; the text has no more\); documents end with id 0", read(capsys)
    )
    main(["prepare-data", "--input", raw, "--tokenizer", other, "--output-prefix", other, "--workers", "1"])
    assert re.search(
        r"other: 40 documents, [\d,]+ tokens \(uint16\), [\d,]+ bytes of text, \d\.\d+ bytes/token", read(capsys)
    )


def read(capsys):
    return capsys.readouterr().out


def test_flags_of_prepare_data(folder, tmp_path, capsys):
    lines = [{"text": text, "title": "a title"} for text in TEXTS]
    data = "".join(json.dumps(line) + "\n" for line in lines) + "{\n"
    (tmp_path / "a.jsonl").write_text(data)
    arguments = [
        "prepare-data",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(folder / "tok"),
        "--workers",
        "1",
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:41: invalid JSON"):
        main([*arguments, "--output-prefix", str(tmp_path / "a")])
    skip = ["--on-bad-line", "skip", "--max-bad-fraction", "0.1"]
    keys = ["--json-keys", "title", "text", "--no-append-eod"]
    assert main([*arguments, "--output-prefix", str(tmp_path / "a"), *skip, *keys]) == 0
    assert "1 bad lines were skipped" in read(capsys)
    tokenizer = Tokenizer.load(folder / "tok")
    assert tokenizer.decode(IndexedDataset(tmp_path / "a_text_document").document(3)) == TEXTS[3]
    assert tokenizer.decode(IndexedDataset(tmp_path / "a_title_document").document(3)) == "a title"
    for flags in (["--workers", "0"], ["--max-bad-fraction", "1.5"]):
        with pytest.raises(ConfigError, match=f"{flags[0]} {flags[1]}: "):
            main([*arguments, "--output-prefix", str(tmp_path / "b"), *flags])


def test_statistics(inspect):
    out = inspect(
        "--data-path", "0.25", "c", "0.75", "c", "--tokenizer", "tok", "--seq-length", "32", "--split", "80,20"
    )
    tokens = IndexedDataset("c").num_tokens
    assert out.startswith("train: endless, 32 tokens each\n")
    assert out.count(f"c: 40 documents, {tokens:,} uint16 tokens, ") == 1
    assert "25 % c: documents 0 to 31, " in out and "75 % c: documents 0 to 31, " in out
    assert re.search(r"valid: \d+ samples, 32 tokens each\n  25 % c: documents 32 to 39, ", out)
    assert out.endswith("test: no documents\n")


def parsed(out, tokenizer, dataset):
    """(sample, micro-batch, rank) of each sample shown, after every text was found where the output says it lies."""
    shown = []
    for part in out.split("\nsample ")[1:]:
        head, *pieces = re.split(r"\n  -- ", part.removesuffix("\n"))
        number, micro_batch, rank = map(int, re.match(r"(\d+): micro-batch (\d+) of data rank (\d+)", head).groups())
        shown.append((number, micro_batch, rank))
        for piece in pieces:
            place, *lines = piece.split("\n  | ")
            document, first, last, length = map(int, re.findall(r"\d+", place))
            ids = dataset.document(document)
            assert length == len(ids)
            text = tokenizer.decode(ids[first : last + 1])
            unescaped = "\n".join(lines).replace("\\t", "\t").replace("\\x1b", "\x1b").replace("\\u202e", "\u202e")
            assert text == unescaped
    return shown


def test_a_step_is_decoded_with_its_provenance(inspect, folder):
    sizes = ["--micro-batch-size", "2", "--global-batch-size", "8", "--data-parallel-size", "2"]
    out = inspect("--data-path", "c", "--tokenizer", "tok", "--seq-length", "32", "--step", "3", *sizes)
    assert out.startswith("step 3: samples 16 to 23, micro batch size 2, data-parallel size 2\n")
    ranks = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    shown = parsed(out, Tokenizer.load("tok"), IndexedDataset("c"))
    assert shown == [(16 + i, *place) for i, place in enumerate(ranks)]
    assert "\x1b" not in out and "\\x1b[31mred" in out and "\u202e" not in out and "<|endoftext|>" in out
    few = inspect("--data-path", "c", "--tokenizer", "tok", "--seq-length", "32", "--step", "3", *sizes, "--limit", "1")
    assert few.count("\nsample ") == 1 and few.endswith("7 more samples; show them with --limit 8\n")


def test_a_run_directory_gives_all_settings(inspect, folder):
    flags = ["--data-path", "c", "--tokenizer", "tok", "--seq-length", "32", "--split", "90,10", "--seed", "7"]
    sizes = ["--micro-batch-size", "1", "--global-batch-size", "4", "--data-parallel-size", "2"]
    tree = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "megatron_ds": {
            "model": {"seq_length": 32, "vocab_size": 300},
            "data": {"data_path": ["c"], "split": "90,10", "tokenizer": "tok"},
            "training": {"seed": 7},
        },
    }
    (folder / "run").mkdir()
    config = resolve(RunConfig.model_validate(tree), world_size=2)
    (folder / "run" / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    for step in ([], ["--step", "5"]):
        assert inspect("--run", "run", *step) == inspect(*flags, *sizes, *step)
    tree["megatron_ds"]["training"]["step_batch_size_schedule"] = "0:2 100:4"
    config = resolve(RunConfig.model_validate(tree), world_size=2)
    (folder / "run" / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert inspect("--run", "run", "--step", "2").startswith("step 2: samples 2 to 3, micro batch size 1, ")
    assert inspect("--run", "run", "--step", "4").startswith("step 4: samples 8 to 11, micro batch size 1, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "tok"], r"give --run DIR, or --data-path PREFIX"),
        (["--data-path", "c"], r"give --tokenizer DIR"),
        (
            ["--data-path", "0.3", "c", "d", "--tokenizer", "tok"],
            r"--data-path 0\.3 c d: weights and prefixes must alternate",
        ),
        (["--data-path", "c", "--tokenizer", "tok", "--split", "1,x"], r"--split 1,x: must be one to three numbers"),
        (["--data-path", "c", "--tokenizer", "tok", "--step", "0"], r"--step 0: steps are counted from 1"),
        (["--data-path", "c", "--tokenizer", "tok", "--seq-length", "0"], r"--seq-length 0: must be 1 or more"),
        (["--data-path", "c", "--tokenizer", "tok", "--seed", "-1"], r"--seed -1"),
        (
            ["--data-path", "c", "--data-parallel-size", "2", "--global-batch-size", "3"],
            r"multiple of micro batch x ranks = 2",
        ),
        (
            ["--data-path", "c", "--tokenizer", "tok", "--seq-length", "8", "--split", "0,1", "--step", "1"],
            "no step saw",
        ),
        (["--run", "nothing"], r"nothing/config\.json: cannot be read"),
    ],
)
def test_wrong_command_lines(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        main(["inspect-data", *arguments])


@pytest.mark.parametrize("content", ["{", "{}", '{"train_batch_size": "many"}'])
def test_a_config_that_is_not_resolved(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: is no resolved configuration"):
        main(["inspect-data", "--run", str(tmp_path), "--tokenizer", "tok"])


def test_a_damaged_corpus_ends_with_exit_code_3_and_one_line(folder, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"c{suffix}").write_bytes((folder / f"c{suffix}").read_bytes())
    os.truncate(tmp_path / "c.bin", 100)
    command = [sys.executable, "-m", "megatron_ds.cli.main", "inspect-data", "--data-path", str(tmp_path / "c")]
    result = subprocess.run([*command, "--tokenizer", str(folder / "tok")], capture_output=True, text=True)
    assert result.returncode == 3 and result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path}/c.bin: has 100 bytes, but the index tells of ")


@pytest.mark.parametrize("name", ["train-tokenizer", "prepare-data", "inspect-data"])
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and f"example:\n  megatron-ds {name} --" in capsys.readouterr().out
