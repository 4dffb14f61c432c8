"""Problems are collected, not raised: a wrong configuration is reported whole, each mistake once.

A value that is already known to be wrong is *spoiled*: whoever finds a later problem that depends on it stays silent,
since mending the first may well mend the second. The report has one numbered line per problem: path, value, rule, fix.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic_core import PydanticUndefined

from megatron_ds.config.schema import RunConfig
from megatron_ds.config.tree import Path, dotted, full_path, lookup, overlap
from megatron_ds.config.values import show
from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One mistake: where, what was found, what is required, what to do."""

    path: Path
    """Keys from the root, or one element holding a flag or a file name."""
    value: Any
    """What was found; ``PydanticUndefined`` shows as "not set"."""
    rule: str
    """What is required, or why the value cannot be."""
    fix: str
    """What to write instead."""
    reads: tuple[Path, ...] = ()
    """The values that a rule looked at; the rule is silent if one of them is spoiled."""


def problem(config: RunConfig, where: str, rule: str, fix: str, *reads: str) -> Problem:
    """A problem at a path of a configuration, which is itself among the values read. Short paths as in ``--set``."""
    path, *others = (full_path(tuple(text.split("."))) for text in (where, *reads))
    value: Any = lookup(config.model_dump(mode="json"), path)
    return Problem(path, PydanticUndefined if value in (None, []) else value, rule, fix, (path, *others))


def divisors(value: int) -> list[int]:
    """All divisors, smallest first."""
    return [d for d in range(1, value + 1) if value % d == 0]


def either(options: list[int]) -> str:
    """Numbers in words: "1, 2 or 4"; a long list keeps its first and last few."""
    shown = [str(option) for option in options]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-3:]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" or {shown[-1]}"


@dataclass
class Findings:
    """The problems found so far, and the paths whose values can no longer be trusted."""

    problems: list[Problem] = field(default_factory=list)
    spoiled: list[Path] = field(default_factory=list)

    def add(self, problem: Problem, *also_spoils: Path) -> None:
        """Record a problem unless it follows from an earlier one."""
        if any(overlap(read, path) for read in problem.reads for path in self.spoiled):
            return
        self.problems.append(problem)
        self.spoiled += [problem.path, *also_spoils]

    def raise_any(self, origin: str, flag_of: dict[Path, str]) -> None:
        """Raise the report as a ConfigError if there is anything to report.

        ``origin`` names the file; ``flag_of`` tells which flag set a path, so that the line can point at it.
        """
        if not self.problems:
            return
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        lines = [f"{i:3d}. {on_one_line(problem, flag_of)}" for i, problem in enumerate(self.problems, 1)]
        raise ConfigError("\n".join([f"{count} in the configuration ({origin})", *lines]))


def on_one_line(problem: Problem, flag_of: dict[Path, str]) -> str:
    """One problem in words, with the flags that set the value or a part of it."""
    path = problem.path
    flags = [flag for where, flag in flag_of.items() if where == path[: len(where)] or where[:-1] == path]
    source = f" ({', '.join(flags)})" if flags else ""
    return f"{dotted(path)}{source} = {show(problem.value)}: {problem.rule}; {problem.fix}"
