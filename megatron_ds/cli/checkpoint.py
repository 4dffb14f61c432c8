"""``megatron-ds checkpoint``: look at checkpoints, check, compare and average them.

What each action does is in ``checkpoint/``; here are its flags and its words. Nothing but ``average`` writes.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megatron_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_ds.checkpoint.listing import Listed

HELP = "List, verify, compare and average checkpoints."
EXAMPLE = "megatron-ds checkpoint ls runs/v1_tiny"
MOST_NAMED = 20
"""Tensors that ``diff --values`` shows, unless told otherwise."""


@dataclass(frozen=True)
class Action:
    """One thing to do with checkpoints."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the actions, each with its flags."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        inner = actions.add_parser(
            name,
            help=action.help,
            description=action.help,
            epilog=f"example:\n  megatron-ds checkpoint {action.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        action.add_arguments(inner)
        inner.set_defaults(act=action.run)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    return args.act(args)


# --- ls -------------------------------------------------------------------------------------------------------------


def _ls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="save directory, or run directory")


def _ls(args: argparse.Namespace) -> int:
    # Here, as in every action, since torch takes seconds to import and --help should not.
    from megatron_ds.checkpoint.listing import best, list_checkpoints

    listed = list_checkpoints(args.directory)
    favourite = best(listed)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("step", "age", "size", "ranks", "tokens", "train loss", "eval loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("layout", "ema", ""):
        table.add_column(name, no_wrap=True)
    for one in listed:
        marks = ["latest"] * one.is_latest + ["best"] * (one is favourite) + [one.note] * bool(one.note)
        table.add_row(str(one.step), _age(one.saved), _size(one.size), *_facts(one), ", ".join(marks))
    console = Console(width=1000, highlight=False, markup=False)  # wide enough that no line is broken
    console.print(table, end="")
    return 0


def _facts(one: "Listed") -> list[str]:
    """What a whole checkpoint tells of the run that wrote it."""
    if one.checkpoint is None:
        return ["-", "-", "-", "-", "-", "-"]
    trainer = one.checkpoint.trainer
    numbers = (trainer.get("train_loss"), one.validation_loss)
    return [
        str(one.checkpoint.manifest.world_size),
        f"{trainer['consumed_tokens']:,}" if "consumed_tokens" in trainer else "-",
        *("-" if number is None else f"{number:.4f}" for number in numbers),
        one.layout,
        "yes" if one.has_mean else "no",
    ]


# --- verify ---------------------------------------------------------------------------------------------------------


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="save directory, run directory, or one step")
    add("--step", type=_step_or_all, metavar="N", help="step to check, or all; by default the newest")


def _verify(args: argparse.Namespace) -> int:
    from megatron_ds.checkpoint.listing import step_directories

    paths = step_directories(args.directory)
    if args.step is None:
        paths = paths[-1:]
    elif args.step != "all":
        paths = [_with_step(paths, args.step)]
    damaged = [path for path in paths if not _is_whole(path)]
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(f"{len(damaged)} of {len(paths)} checked are damaged: {names}; the lines above say where")
    return 0


def _is_whole(path: Path) -> bool:
    """Check every byte of a checkpoint, and print what was found: a line for every bad file."""
    from megatron_ds.checkpoint.manifest import Manifest
    from megatron_ds.checkpoint.reader import Checkpoint

    began, files, size = time.monotonic(), 0, 0
    try:
        if path.is_symlink():
            raise CheckpointError("symbolic links are refused; give the directory itself")
        manifest = Manifest.read(path)
        problems = manifest.problems(path, manifest.files, hashes=True, progress=True) + manifest.strangers(path)
        if not problems:
            Checkpoint(path, manifest).check_pieces()
        files, size = len(manifest.files), sum(entry.size for entry in manifest.files.values())
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"{path}: {problem}", flush=True)
    if not problems:
        seconds = time.monotonic() - began
        print(f"{path}: whole, {files} files, {_size(size)}, {seconds:.1f} s", flush=True)
    return not problems


# --- diff -----------------------------------------------------------------------------------------------------------


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name in ("a", "b"):
        add(name, type=Path, metavar=name.upper(), help="step, or save directory for its newest")
    add("--values", action="store_true", help="also compare all values, which reads both")
    add(
        "--top", type=_count, metavar="N", default=MOST_NAMED, help="tensors to show of --values (default: %(default)s)"
    )


def _diff(args: argparse.Namespace) -> int:
    from megatron_ds.checkpoint.compare import settings_differences, tensor_differences, value_differences
    from megatron_ds.checkpoint.store import open_checkpoint

    a, b = (open_checkpoint(path, verify=False) for path in (args.a, args.b))
    print(f"a: {a.path}\nb: {b.path}")
    sections = {
        "configuration": settings_differences(a.config, b.config),
        "trainer": settings_differences(a.trainer, b.trainer),
        "tensors": tensor_differences(a, b),
    }
    if args.values:
        found = sorted(value_differences(a, b), key=lambda one: (not math.isnan(one.largest), -one.largest))
        lines = [
            f"{one.kind} of {one.name}: max |a - b| {one.largest:.3g}, {one.differing:,} of {one.elements:,} differ"
            for one in found[: args.top]
        ]
        more = [f"and {len(found) - args.top} more tensors"] if len(found) > args.top else []
        sections["values"] = lines + more
    for name, lines in sections.items():
        if lines:
            print("\n  ".join([f"{name}:", *lines]))
    if any(sections.values()):
        return 1
    print("no difference" if args.values else "no difference but perhaps in values, which --values compares")
    return 0


# --- average --------------------------------------------------------------------------------------------------------


def _average_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", type=Path, metavar="DIR", required=True, help="save directory, or run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=_count, metavar="N", help="average the newest N")
    which.add_argument("--steps", type=_step, metavar="N", nargs="+", help="average these steps")
    add("--output", type=Path, metavar="DIR", required=True, help="new save directory for the mean")


def _average(args: argparse.Namespace) -> int:
    from megatron_ds.checkpoint.listing import step_directories
    from megatron_ds.checkpoint.mean import average
    from megatron_ds.checkpoint.store import open_checkpoint

    paths = step_directories(args.load)
    if args.steps:
        chosen = [_with_step(paths, step) for step in sorted(set(args.steps))]
    elif args.last > len(paths):
        raise ConfigError(f"--last {args.last}: {args.load} has {len(paths)} checkpoints")
    else:
        chosen = paths[-args.last :]
    saved = average([open_checkpoint(path) for path in chosen], args.output)
    print(f"{saved.path}: mean of {', '.join(path.name for path in chosen)}; weights only, fp32, {_size(saved.bytes)}")
    print(f"use it as --load {args.output} of export-hf and generate, or with --finetune to train from it")
    return 0


ACTIONS = {
    "ls": Action("List the checkpoints of a directory.", "ls runs/v1_tiny", _ls_arguments, _ls),
    "verify": Action(
        "Hash every file of a checkpoint, and name those that are not as they were written.",
        "verify runs/v1_tiny --step all",
        _verify_arguments,
        _verify,
    ),
    "diff": Action(
        "Compare two checkpoints of any layout; exit code 0 without, 1 with a difference.",
        "diff runs/v1_tiny/checkpoints/global_step100 runs/v1_tiny/checkpoints/global_step200 --values",
        _diff_arguments,
        _diff,
    ),
    "average": Action(
        "Write the mean of the weights of several checkpoints.",
        "average --load runs/v1_tiny --last 3 --output runs/v1_tiny_mean",
        _average_arguments,
        _average,
    ),
}


# --- words ----------------------------------------------------------------------------------------------------------


def _with_step(paths: list[Path], step: int) -> Path:
    """The checkpoint of a step; ConfigError that names those there are."""
    for path in paths:
        if path.name == f"global_step{step}":
            return path
    known = ", ".join(path.name.removeprefix("global_step") for path in paths)
    raise ConfigError(f"step {step}: no such checkpoint in {paths[0].parent}; it has {known}")


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a step, not {text}")
    return int(text)


def _step_or_all(text: str) -> int | str:
    return text if text == "all" else _step(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def _size(size: int) -> str:
    return f"{tqdm.format_sizeof(size)}B"


def _age(since: float) -> str:
    """How long ago, in the largest unit: 7 s, 12 min, 3 h, 2 d."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
