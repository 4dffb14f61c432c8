"""From a command line to a configuration: one JSON file, one set of flags, one frozen tree or one report.

Later sources win: schema default, generation default, the model that the run begins with (``pretrained.py``), file,
flag. They are merged as raw trees, checked against the schema (``check.py``), against the rules between settings
(``rules.py``), and completed (``resolve.py``). Whatever is wrong anywhere is raised at the end as one ConfigError with
a numbered line per problem.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from megatron_ds.config.check import check
from megatron_ds.config.deepspeed_dict import deepspeed_dict
from megatron_ds.config.flags import LEAVES_AT, CommandLine, read_command_line
from megatron_ds.config.help import help_text
from megatron_ds.config.json_file import read_json
from megatron_ds.config.pretrained import LOAD, Pretrained
from megatron_ds.config.problems import Findings, Problem
from megatron_ds.config.resolve import ACCUMULATION, LR, MICRO, RUN_NAME, TRAIN, TRAIN_ITERS, TRAIN_SAMPLES, resolve
from megatron_ds.config.rules import find_broken
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import OURS, TAG, Path, Tree, dotted, flatten, lookup, overlap, remove, write
from megatron_ds.config.values import accepts, show

__all__ = ["LoadedConfig", "deepspeed_dict", "load_config"]

GENERATION = (OURS, "generation")
GENERATION_DEFAULTS: dict[str, Tree] = {
    "v1": {},
    "v2": {
        OURS: {
            "model": {
                "attention": {"kind": "full"},
                "qk_layernorm": False,
                "rotary_interleaved": True,
                "norm_epsilon": 1e-5,
            },
            "moe": {},
        }
    },
    "v3": {
        OURS: {
            "model": {
                "attention": {"kind": "latent"},
                "qk_layernorm": False,
                "rotary_interleaved": True,
                "norm_epsilon": 1e-6,
                "untie_embeddings_and_output_weights": True,
                "init_method_std": 0.006,
            },
            "moe": {"router": {"kind": "sigmoid", "fine": "bias"}},
            "parallel": {"sequence_parallel": True},
        }
    },
}
"""What a generation sets before the file does, as a raw tree; the schema's own defaults are v1's."""


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and how it came about."""

    config: RunConfig
    """Complete and valid for the given number of ranks."""
    file: FilePath | None
    """The file it was read from, None when flags were enough."""
    changes: list[str]
    """Printable: how the configuration differs from the file."""


def load_config(
    argv: list[str],
    *,
    prog: str = "pretrain.py",
    world_size: int | None = None,
    defaults_in: Callable[[FilePath], dict[str, Any] | None] = lambda directory: None,
) -> LoadedConfig:
    """Read file and flags into a complete configuration.

    Args:
        argv: the command line.
        prog: its program, for ``--help``, which prints and exits with code 0.
        world_size: ranks; by default the launcher's WORLD_SIZE, or 1.
        defaults_in: the sections that the directory ``checkpoint.load`` settles (``hf.sections.run_defaults``); None
            for a directory of checkpoints.

    Raises ConfigError naming every problem of the file, the flags and their combination.
    """
    findings = Findings()
    line = read_command_line(argv, findings)
    if line.help:
        print(help_text(prog))
        raise SystemExit(0)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    file = FilePath(line.file) if line.file is not None else None
    from_file = read_json(file, findings) if file else {}
    origin = f"{file} and the command line" if file else "the command line"
    pretrained = _pretrained(from_file or {}, line, defaults_in)
    if pretrained:
        for contradiction in pretrained.contradictions():
            findings.add(contradiction)
        findings.raise_any(origin, line.flag_of)
    tree, lost = merge(from_file or {}, line, pretrained)
    config = check(tree, findings)
    for path in lost:
        rule, fix = "lies inside a value that has no such part", "docs/configuration.md lists every key"
        findings.add(Problem(path, line.values[path], rule, fix, (path,)))
    if from_file is not None:
        find_broken(config, ranks, findings)
    findings.raise_any(origin, line.flag_of)
    resolved = resolve(config, ranks, file.stem if file else "run")
    return LoadedConfig(resolved, file, changes(resolved, from_file or {}, line, pretrained))


def _pretrained(
    from_file: Tree, line: CommandLine, defaults_in: Callable[[FilePath], dict[str, Any] | None]
) -> Pretrained | None:
    """The settings of the model that the run begins with; None when it begins with none, or with a checkpoint."""
    load = line.values.get(LOAD, lookup(from_file, LOAD))
    sections = defaults_in(FilePath(load)) if isinstance(load, str) else None
    if sections is None:
        return None
    user = deepcopy(from_file)
    _write_flags(user, line)
    return Pretrained.of(load, sections, user)


def merge(from_file: Tree, line: CommandLine, pretrained: Pretrained | None = None) -> tuple[Tree, list[Path]]:
    """One raw tree from all sources, and the paths of flags that could not be written into it."""
    file = deepcopy(from_file)
    _drop_automatic(file)
    _yield_batch(file, line)
    _yield_length(file, line)
    _yield_kinds(file, line)
    below = pretrained.below() if pretrained else {}
    generation = line.values.get(GENERATION, lookup(file, GENERATION, lookup(below, GENERATION, "v1")))
    tree = _overlay(_overlay(deepcopy(GENERATION_DEFAULTS.get(str(generation), {})), below), file)
    return tree, _write_flags(tree, line)


def _overlay(below: Any, above: Any) -> Any:
    """Two raw trees in one; where both have a value, ``above`` wins."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _overlay(below.get(key), value) for key, value in above.items()}


def _drop_automatic(file: Tree) -> None:
    """In DeepSpeed's keys "auto" means not given, as in the files of other trainers, unless it is a value there."""
    for path, value in flatten(file).items():
        known = value == "auto" and path[0] != OURS and path in LEAVES_AT
        if known and not accepts(LEAVES_AT[path][0].annotation, value):
            remove(file, path)


def _yield_batch(file: Tree, line: CommandLine) -> None:
    """With all three batch keys given and one of them by a flag, a value of the file gives way and is derived again."""
    keys = (ACCUMULATION, TRAIN, MICRO)
    by_flag = [key for key in keys if key in line.values]
    given = [key for key in keys if key in line.values or lookup(file, key) is not None]
    if by_flag and len(given) == len(keys):
        for key in [key for key in keys if key not in by_flag][:1]:
            remove(file, key)


def _yield_length(file: Tree, line: CommandLine) -> None:
    """A length given by a flag, in steps or in sequences, replaces the one of the file."""
    for given, other in ((TRAIN_ITERS, TRAIN_SAMPLES), (TRAIN_SAMPLES, TRAIN_ITERS)):
        if given in line.values and other not in line.values:
            remove(file, other)


def _yield_kinds(file: Tree, line: CommandLine) -> None:
    """A flag that names another kind of a tagged section replaces the file's section, whose keys belong to its kind."""
    for path, kind in line.values.items():
        section = path[:-1]
        if path[-1] == TAG and path in LEAVES_AT and lookup(file, path, LEAVES_AT[path][0].default) != kind:
            remove(file, section)


def _write_flags(tree: Tree, line: CommandLine) -> list[Path]:
    """Write all flags into a tree; the paths of those that could not be."""
    shallow_first = sorted(line.values, key=len)
    return [path for path in shallow_first if not _write_flag(tree, path, line.values[path])]


def _write_flag(tree: Tree, path: Path, value: Any) -> bool:
    """Write a flag's value, whether that was possible; a last element that is a number addresses an item of a list."""
    *whole, last = path
    if not last.isdigit() or tuple(whole) not in LEAVES_AT:
        return write(tree, path, value)
    items = lookup(tree, tuple(whole), LEAVES_AT[tuple(whole)][0].default)
    if not isinstance(items, list | tuple) or int(last) >= len(items):
        return False
    return write(tree, tuple(whole), [*items[: int(last)], value, *items[int(last) + 1 :]])


def changes(config: RunConfig, from_file: Tree, line: CommandLine, pretrained: Pretrained | None = None) -> list[str]:
    """How the complete configuration differs from the file, one line per setting; defaults are only counted."""
    given, final = flatten(from_file), flatten(config.model_dump(mode="json"))
    derived = (pretrained.sources() if pretrained else {}) | _derived(config, line)
    lines, defaults = [], 0
    for path, value in final.items():
        flags = [flag for written, flag in line.flag_of.items() if overlap(written, path)]
        source = ", ".join(flags) or derived.get(path)
        reason = f" ({source})" if source else ""
        if path in given and given[path] != value:
            lines.append(f"{dotted(path)}: {show(given[path])} -> {show(value)}{reason}")
        elif path not in given and source:
            lines.append(f"{dotted(path)}: {show(value)}{reason}")
        elif path not in given:
            defaults += 1
    lines += [f"{dotted(path)}: {show(given[path])} -> not used" for path in given if path not in final]
    return [*lines, f"{defaults} settings have their default"]


def _derived(config: RunConfig, line: CommandLine) -> dict[Path, str]:
    """Where the values come from that ``resolve`` fills in."""
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    train = config.train_batch_size
    assert train and micro and steps, "a loaded configuration is resolved"
    product = f"{train} = micro batch {micro} x accumulation {steps} x {train // micro // steps} data-parallel ranks"
    reasons = dict.fromkeys((TRAIN, MICRO, ACCUMULATION), product)
    reasons[LR] = f"5e-4 x global batch {train} / 256"
    samples = config.megatron_ds.training.train_samples
    if samples is not None:
        reasons[TRAIN_ITERS] = f"the steps within {samples} sequences"
    if line.file:
        reasons[RUN_NAME] = "the file's name"
    return reasons
