"""The dispatcher: finds subcommands, keeps help fast, turns every wrong command line into one line and code 2."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ds.cli import main as cli
from megatron_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_ds.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture
def command(monkeypatch):
    """A subcommand ``count-words`` that needs --input and returns the number of words as its exit code."""
    module = SimpleNamespace(
        HELP="Count words.",
        EXAMPLE="megatron-ds count-words --input a.txt",
        add_arguments=lambda parser: parser.add_argument("--input", required=True),
        run=lambda args: len(args.input.split()),
    )
    monkeypatch.setattr(cli, "SUBCOMMANDS", {"count-words": "fake.module"})
    monkeypatch.setattr(cli.importlib, "import_module", lambda path: {"fake.module": module}[path])
    return module


def test_a_subcommand_gets_its_flags_and_gives_its_code(command):
    assert cli.main(["count-words", "--input", "a b c"]) == 3


def test_help_of_a_subcommand_ends_with_its_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["count-words", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: megatron-ds count-words")
    assert text.endswith("example:\n  megatron-ds count-words --input a.txt\n")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_has_a_line_per_subcommand(command, capsys, argv):
    assert cli.main(argv) == 0
    assert "  count-words  Count words.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["count-word"], "count-word is no subcommand of megatron-ds; did you mean count-words?"),
        (["zzz"], "zzz is no subcommand of megatron-ds; see megatron-ds --help"),
        (["count-words"], "the following arguments are required: --input; see megatron-ds count-words --help"),
        (["count-words", "--inp", "a"], "the following arguments are required: --input"),
        (["count-words", "--input", "a", "--x"], "unrecognized arguments: --x; see megatron-ds count-words --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(command, argv, message):
    with pytest.raises(ConfigError) as caught:
        cli.main(argv)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_wrong_subcommand_ends_with_code_2():
    done = run("exprt-hf")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: exprt-hf is no subcommand of megatron-ds; did you mean export-hf?\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from megatron_ds.cli.main import overview; text = overview(); "
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; print(text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in cli.SUBCOMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    assert f"example:\n  megatron-ds {name} " in capsys.readouterr().out
