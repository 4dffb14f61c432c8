"""What a user may choose for an export. Imports no torch, so that ``--help`` answers at once."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A number format: its name in torch and config.json, its name in safetensors, its bytes."""

    name: str
    tag: str
    itemsize: int


FORMATS = {
    "fp32": Format("float32", "F32", 4),
    "bf16": Format("bfloat16", "BF16", 2),
    "fp16": Format("float16", "F16", 2),
}

MTP_PLACES = ("inline", "separate", "drop")
"""Where blocks of multi-token prediction go: with the other layers, into a directory of their own, nowhere."""

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportOptions:
    """``target`` is a model_type or auto, ``mtp`` one of MTP_PLACES or auto, ``precision`` a key of FORMATS (None: the
    run's own), ``tokenizer`` a directory (None: the checkpoint's copy), ``max_shard_size`` bytes, ``command`` the line
    for the model card."""

    target: str = "auto"
    mtp: str = "auto"
    precision: str | None = None
    tokenizer: Path | None = None
    max_shard_size: int = 4 * 2**30
    force: bool = False
    verify: bool = False
    command: str = "megatron-ds export-hf"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GiB``, ``500MB`` or ``1000000``; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if unit else 0
    if size <= 0:
        raise ConfigError(f"--max-shard-size {text}: not a size; write it as 4GiB, 500MB or a number of bytes")
    return size
