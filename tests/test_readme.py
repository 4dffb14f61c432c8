"""The README is a promise: its shell blocks are run as written, in a fresh clone, and its figures are compared.

Only two things differ from a user's machine: the clone's address is this repository, and the environment that the tests
run in stands in for the one that ``make`` would install (installing is what made it).
"""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_ds.cli import main as cli
from megatron_ds.config.load import load_config

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
VENV = Path(sys.executable).parent.parent
BITS_PER_BYTE = 2.2


def shell_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a user clones: the committed and the uncommitted files that git would track."""
    directory = tmp_path_factory.mktemp("readme")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    repository = directory / "origin"
    for name in filter(None, names):
        if (ROOT / name).exists():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_bytes((ROOT / name).read_bytes())
            (repository / name).chmod((ROOT / name).stat().st_mode)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    return directory


@pytest.mark.timeout(1800)
def test_the_readme_runs_as_written(clone):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL")
    }
    first, *rest = shell_blocks()
    clone_line, *commands = first.strip().splitlines()
    assert clone_line.startswith("git clone ")
    clone_line = re.sub(r"https://\S+", "origin megatron_ds", clone_line)
    prepare = f"ln -s {VENV} .venv && touch .venv/installed .venv/installed-dev"
    script = "\n".join(["set -euo pipefail", clone_line, prepare, *commands, *rest])
    result = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    after = re.search(r"after training\s+([\d.]+)\s+([\d.]+)", result.stdout)
    assert after, result.stdout[-3000:]
    assert float(after[2]) <= BITS_PER_BYTE
    shown = re.search(r"after training\s+([\d.]+)\s+([\d.]+)", README)
    assert float(after[2]) == pytest.approx(float(shown[2]), abs=0.03), "the README shows another figure"


STAND_IN = '#!/usr/bin/env bash\nprintf "%q " "${0##*/}" "$@" >>commands\necho >>commands\n'
"""A program that writes down how it was called."""


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*/run.sh")), ids=lambda path: path.parent.name)
def test_examples_give_legal_commands(example, tmp_path, monkeypatch):
    """The first example is run above; what the others call is read as the called ones would."""
    script = tmp_path / example.relative_to(ROOT)
    script.parent.mkdir(parents=True)
    script.write_text(example.read_text())
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for name in ("data/raw/stdlib.jsonl", "data/tokenizer/tokenizer.json", "data/corpus.bin", "data/corpus.idx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("deepspeed", "megatron-ds", "python"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, check=True)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    for program, first, *rest in commands:
        if program == "deepspeed":
            number, file, *flags = rest
            assert (first, file) == ("--num_gpus", "pretrain.py")
            assert load_config(flags, world_size=int(number)).config.train_batch_size
        elif program == "megatron-ds":
            module = import_module(cli.SUBCOMMANDS[first])
            cli.subcommand_parser(first, module).parse_args(rest)
        else:
            assert (ROOT / first).exists()
    assert {program for program, *_ in commands} >= {"deepspeed", "megatron-ds"}


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"


def test_files_named_in_the_pages_exist():
    for page in [ROOT / "README.md", ROOT / "docs" / "reading_order.md"]:
        for name in re.findall(r"`((?:megatron_ds|tests|benchmarks|ds_configs|examples)/[\w./]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name} does not exist"
