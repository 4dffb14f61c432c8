"""The text of ``--help``: every flag under its section, with its documentation and default, and an example.

Made from the schema and the tables of ``megatron_flags.py``, so that it cannot be out of date.
"""

import shutil
import textwrap
from pathlib import PurePath

from pydantic_core import PydanticUndefined

from megatron_ds.config.flags import FLAGS, Flag, placeholder
from megatron_ds.config.megatron_flags import ALIASES
from megatron_ds.config.schema import MegatronDs
from megatron_ds.config.tree import OURS, dotted
from megatron_ds.config.values import show

_INTRO = """\
usage: {prog} [--deepspeed_config FILE] [FLAG ...]

Settings come from a JSON file with DeepSpeed's keys and a "megatron_ds" section; a flag overrides the file.
docs/configuration.md lists every key, docs/from_megatron.md the flags of Megatron. Defaults stand in [brackets];
a setting whose default is none takes none as a value.

  --deepspeed_config FILE     the configuration file (also --config)
  --set PATH=VALUE ...        any key by its path: zero_optimization.stage=2, model.num_layers=4
  --help                      this text
"""
_EXAMPLE = """\
example:
  deepspeed --num_gpus 2 {prog} --deepspeed_config ds_configs/v1_tiny.json \\
      --data-path 0.3 data/books 0.7 data/code --pipeline-model-parallel-size 2 --attention hybrid --attention-window 64
"""
_INDENT = 30


def help_text(prog: str) -> str:
    """The whole help text, wrapped to the width of the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    titles = {name: (field.annotation.__doc__ or "") for name, field in MegatronDs.model_fields.items()}
    blocks = [_INTRO.format(prog=PurePath(prog).name)]
    for section, doc in titles.items():
        ours = [flag for flag in FLAGS.values() if flag.path[:2] == (OURS, section) and flag.name not in ALIASES]
        blocks.append(_block(section if len(ours[0].path) > 2 else "", doc, ours, width))
    theirs = [FLAGS[name] for name in ALIASES]
    blocks.append(_block("DeepSpeed's keys, and second names", "", theirs, width))
    return "\n".join([*blocks, _EXAMPLE.format(prog=PurePath(prog).name)])


def _block(title: str, doc: str, flags: list[Flag], width: int) -> str:
    first, *_ = doc.strip().split("\n")
    head = [f"{title}: {first}" if doc and title else title] if title else []
    return "\n".join([*head, *(_entry(flag, width) for flag in flags), ""])


def _entry(flag: Flag, width: int) -> str:
    """One flag: name and placeholder on the left, what it means and its default on the right."""
    left = f"  {_spelling(flag)} {placeholder(flag)}".rstrip()
    target = f"{dotted(flag.path)}: " if flag.name in ALIASES else ""
    text = f"{target}{flag.leaves[0].doc.replace('``', '')} {default_text(flag)}".strip()
    lines = textwrap.wrap(text, width - _INDENT, break_long_words=False, break_on_hyphens=False)
    if len(left) >= _INDENT:
        return "\n".join([left, *(" " * _INDENT + line for line in lines)])
    return "\n".join([left.ljust(_INDENT) + lines[0], *(" " * _INDENT + line for line in lines[1:])])


def _spelling(flag: Flag) -> str:
    return f"--[no-]{flag.name[2:]}" if flag.is_switch else flag.name


def default_text(flag: Flag) -> str:
    """The default in square brackets, per kind where the kinds differ."""
    words = []
    for leaf in flag.leaves:
        default = leaf.default
        if flag.path != leaf.path and isinstance(default, tuple):
            default = default[int(flag.path[-1])]
        shown = "no default" if default is PydanticUndefined else "none" if default is None else show(default)
        words.append(f"{leaf.variant}: {shown}" if leaf.variant else shown)
    return f"[{', '.join(words)}]" if words not in (["[]"], ["{}"]) else ""
