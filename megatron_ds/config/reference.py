"""The reference pages, written from the schema and the flag tables.

``python -m megatron_ds.config.reference > docs/configuration.md`` and
``python -m megatron_ds.config.reference from_megatron > docs/from_megatron.md``; a test fails when a page is behind.
"""

import sys

from pydantic_core import PydanticUndefined

from megatron_ds.config.deepspeed_keys import PIPELINE_REFUSED, REFUSED, ZERO_REFUSED
from megatron_ds.config.flags import FLAGS, placeholder
from megatron_ds.config.load import GENERATION_DEFAULTS
from megatron_ds.config.megatron_flags import ALIASES, ALWAYS, IMPLIED, REFUSED_FLAGS, SHORTHANDS, VALUES
from megatron_ds.config.tree import LEAVES, TAG, Leaf, Path, dotted, flatten
from megatron_ds.config.values import describe, show

_CONFIGURATION = """\
# Configuration

*Written by `python -m megatron_ds.config.reference`; a test compares it with the schema.*

One JSON file holds a run: DeepSpeed's keys at the top level, ours under `"megatron_ds"`. What is in neither has its
default. Later sources win:

    schema default < generation default < JSON file < flag

```
deepspeed --num_gpus 2 pretrain.py --deepspeed_config ds_configs/v1_tiny.json \\
    --data-path 0.3 data/books 0.7 data/code --train-iters 500 --set zero_optimization.overlap_comm=true
```

- Every key of `megatron_ds` is a flag, in the spelling of Megatron: `num_layers` is `--num-layers`. A nested section
  gives a prefix, `--attention-window`; the kind of a section is the section's name, `--attention hybrid`. The flags of
  DeepSpeed's keys are in [from_megatron.md](from_megatron.md).
- `--set PATH=VALUE` reaches every key: `--set zero_optimization.stage=2`, `--set model.num_layers=4`.
- Switches have a `--no-` form; `none` unsets what may be null; lists take several values; dictionaries `NAME=VALUE`.
- The order of flags has no meaning: two flags that give one setting different values are an error. A flag that names
  another kind of a section replaces the file's section.
- `"auto"` in one of DeepSpeed's keys means that it is not given. `lr: "auto"` is 5e-4 x global batch / 256.
- Two of `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` give the third;
  `train_batch_size` alone is one micro-batch per rank. When flag and file together give all three, the file's
  `gradient_accumulation_steps` is derived again, or its `train_batch_size` if the flag gives the accumulation.
- Launchers' `--local_rank` and `--deepspeed` are accepted and have no effect.

Everything that is wrong is reported at once, with the exit code 2: unknown keys, types, ranges, and rules between
settings, each with its path, the value, the rule and what to do. A run starts only without any.

The complete configuration is printed as a difference from the file, and saved in the run directory and every
checkpoint. It loads again to the same configuration.
"""

_FROM_MEGATRON = """\
# Coming from Megatron

*Written by `python -m megatron_ds.config.reference from_megatron`; a test compares it with the flag tables.*

Flags keep Megatron's names where Megatron has the setting. A flag of Megatron-LM or Megatron-DeepSpeed falls into one
of four groups: it writes a key, it states what is always so here, it is refused with a hint, or it is unknown (an error
that suggests the nearest flag). Nothing is ignored in silence.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    sections: dict[tuple[Path, str | None], list[Leaf]] = {}
    for leaf in LEAVES:
        sections.setdefault((leaf.path[:-1], leaf.variant), []).append(leaf)
    blocks = [_CONFIGURATION]
    flags: dict[Path, list[str]] = {}
    for name, flag in FLAGS.items():
        flags.setdefault(flag.leaves[0].path, []).append(f"`{name}`")
    for (path, variant), leaves in sections.items():
        title = f"`{dotted(path)}`" if path else "Top level"
        doc = "" if leaves[0].path[-1] == TAG else (leaves[0].owner.__doc__ or "").strip().replace("``", "`")
        rows = [
            (f"`{leaf.path[-1]}`", _type(leaf), _default(leaf), ", ".join(flags.get(leaf.path, [])), _meaning(leaf))
            for leaf in leaves
        ]
        heading = f"## {title}" + (f" of kind `{variant}`" if variant else "")
        blocks.append(_section(heading, doc, ("key", "type", "default", "flag", "meaning"), rows))
    for generation, tree in GENERATION_DEFAULTS.items():
        if rows := [(f"`{dotted(path)}`", f"`{show(value)}`") for path, value in flatten(tree).items()]:
            note = "Where the file says nothing, this generation differs from the defaults above."
            blocks.append(_section(f"## Defaults of generation `{generation}`", note, ("key", "default"), rows))
    for name, refused in (("", REFUSED), ("zero_optimization", ZERO_REFUSED), ("pipeline", PIPELINE_REFUSED)):
        rows = [(f"`{key}`", reason, fix) for key, (reason, fix) in refused.items()]
        heading = f"## Refused keys{f' of `{name}`' if name else ''}"
        note = 'A value that only says "off" (`false`, or `"enabled": false`) is accepted.' if not name else ""
        blocks.append(_section(heading, note, ("key", "reason", "instead"), rows))
    return "\n".join(blocks)


def from_megatron_page() -> str:
    """docs/from_megatron.md."""
    theirs = [(f"`{name}`", f"`{path}`", _renamed(name), _implied(name)) for name, path in ALIASES.items()]
    short = [(f"`{name}`", f"`{path}`", f"`{show(value)}`") for name, (path, value) in SHORTHANDS.items()]
    ours = [
        (f"`{f'{name} {placeholder(flag)}'.strip()}`", f"`{dotted(flag.path)}`")
        for name, flag in FLAGS.items()
        if name not in ALIASES
    ]
    always = [(f"`{name} {' or '.join(ok)}`".replace(" `", "`"), fact) for name, (ok, fact) in ALWAYS.items()]
    refused = [(f"`{name}`", reason, fix) for name, (reason, fix) in REFUSED_FLAGS.items()]
    return "\n".join(
        [
            _FROM_MEGATRON,
            _section(
                "## Flags of DeepSpeed's keys, and second names", "", ("flag", "key", "value", "also sets"), theirs
            ),
            _section("## Flags for one value of a key", "", ("flag", "key", "value"), short),
            _section("## Accepted, since it is always so", "", ("flag", "fact"), always),
            _section("## Refused", "", ("flag", "reason", "instead"), refused),
            _section("## Flags of our keys", "", ("flag", "key"), ours),
        ]
    )


def _section(heading: str, text: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [columns, ("---",) * len(columns), *rows]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([heading, "", *([text, ""] if text else []), *table, ""])


def _renamed(name: str) -> str:
    return ", ".join(f"`{theirs}` = `{ours}`" for theirs, ours in VALUES.get(name, {}).items())


def _implied(name: str) -> str:
    path, value = IMPLIED.get(name, ("", None))
    return f"`{path}` = `{show(value)}`" if path else ""


def _type(leaf: Leaf) -> str:
    words, form, pattern = describe(leaf.annotation).partition("of the form ")
    pattern, alternative, rest = pattern.partition(" or ")
    return f"{words}{form}`{pattern}`{alternative}{rest}" if form else words


def _default(leaf: Leaf) -> str:
    if leaf.path[-1] in leaf.owner.passed_on:
        return "DeepSpeed's"
    return "required" if leaf.default is PydanticUndefined else f"`{show(leaf.default)}`"


def _meaning(leaf: Leaf) -> str:
    if leaf.path[-1] in leaf.owner.passed_on:
        return "Passed on to DeepSpeed."
    return leaf.doc.replace("``", "`").replace("\n", " ")


PAGES = {"configuration": configuration_page, "from_megatron": from_megatron_page}

if __name__ == "__main__":
    print(PAGES[sys.argv[1] if len(sys.argv) > 1 else "configuration"](), end="")
