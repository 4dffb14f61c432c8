"""``megatron-ds``: find the subcommand, let it define its flags, run it.

Each subcommand is a module with ``HELP``, ``EXAMPLE``, ``add_arguments(parser)`` and ``run(args)``. It imports torch
and the like only inside ``run``, so that ``megatron-ds --help`` answers at once. What subcommands do is not known here.
"""

import argparse
import importlib
from types import ModuleType
from typing import NoReturn

from megatron_ds.config.values import nearest
from megatron_ds.errors import ConfigError, run_main

SUBCOMMANDS: dict[str, str] = {
    "train-tokenizer": "megatron_ds.cli.train_tokenizer",
    "prepare-data": "megatron_ds.cli.prepare_data",
    "inspect-data": "megatron_ds.cli.inspect_data",
    "schedule": "megatron_ds.cli.schedule",
    "plan": "megatron_ds.cli.plan",
    "experts": "megatron_ds.cli.experts",
    "checkpoint": "megatron_ds.cli.checkpoint",
    "import-hf": "megatron_ds.cli.import_hf",
    "export-hf": "megatron_ds.cli.export_hf",
    "generate": "megatron_ds.cli.generate",
}
"""Name to module, in the order of a run."""

_HELP_FLAGS = ("-h", "--help")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line with the way to the help, like every other error of the user."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: list[str]) -> int:
    """Run ``megatron-ds ARGV``; the exit code. Raises ConfigError for a wrong command line."""
    if not argv or argv[0] in _HELP_FLAGS:
        print(overview())
        return 0
    name, *rest = argv
    if name not in SUBCOMMANDS:
        meant = nearest(name, SUBCOMMANDS)
        hint = f"did you mean {meant}?" if meant else "see megatron-ds --help"
        raise ConfigError(f"{name} is no subcommand of megatron-ds; {hint}")
    module = importlib.import_module(SUBCOMMANDS[name])
    return module.run(subcommand_parser(name, module).parse_args(rest))


def subcommand_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one subcommand; its help ends with an example."""
    parser = _Parser(
        prog=f"megatron-ds {name}",
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def overview() -> str:
    """The help of ``megatron-ds`` itself: every subcommand with its line."""
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{importlib.import_module(path).HELP}" for name, path in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-ds SUBCOMMAND [FLAG ...]",
            "",
            "Prepare data for megatron_ds, look at it, and use what was trained.",
            "Training itself: deepspeed pretrain.py --deepspeed_config FILE",
            "",
            "subcommands:",
            *lines,
            "",
            "megatron-ds SUBCOMMAND --help has the flags and an example.",
            "",
            "example:",
            "  megatron-ds export-hf --load runs/v1_tiny/checkpoints --output hf_model",
        ]
    )


def entry() -> None:
    """The console script."""
    run_main(main)


if __name__ == "__main__":
    entry()
