"""What a Hugging Face directory says about its model, in our configuration's words; config.json alone, without torch.

The target of its model_type translates (``targets/``), and the schema judges the result. So a run can take its model
section from the directory that it begins with, and a command can refuse one before anything heavy is imported. The
tensors are for ``reader.py``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ds.config.model_schema import LatentAttention, ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.values import nearest
from megatron_ds.errors import ConfigError
from megatron_ds.hf.options import FORMATS
from megatron_ds.hf.targets import TARGETS
from megatron_ds.hf.targets.common import Target


@dataclass(frozen=True)
class Sections:
    """The sections of our configuration that a directory settles."""

    path: Path
    """The directory."""
    content: dict[str, Any]
    """Its config.json."""
    target: Target
    """Its family."""
    tree: dict[str, Any]
    """``generation``, ``model`` and, with experts, ``moe``, with just the keys that config.json settles."""
    model: ModelConfig
    moe: MoEConfig | None

    @property
    def precision(self) -> str:
        """What the weights were saved in, a key of ``FORMATS``; fp32, which holds all others, when it is not said."""
        dtype = self.content.get("dtype") or self.content.get("torch_dtype")
        return next((name for name, format in FORMATS.items() if format.name == dtype), "fp32")

    @property
    def eos(self) -> int | None:
        """The id that ends a text, the first one of several; None when config.json has none."""
        eos = self.content.get("eos_token_id")
        return eos[0] if isinstance(eos, list) and eos else eos if isinstance(eos, int) else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks of FP8 weights that share a factor; None when nothing is quantized.

        ConfigError for any other quantization.
        """
        quantization = self.content.get("quantization_config")
        if quantization is None:
            return None
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        block = quantization.get("weight_block_size") if method == "fp8" else None
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise ConfigError(
                f"{self.path / 'config.json'}: quantization_config: {method or 'unknown'} weights cannot be read; "
                "fp8 with a weight_block_size can, and whatever transformers dequantizes and saves"
            )
        return block[0], block[1]


def is_hugging_face_directory(directory: Path) -> bool:
    """Whether ``directory`` has a config.json that names a model_type."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def read_sections(directory: Path) -> Sections:
    """The sections of a Hugging Face directory.

    Raises ConfigError, naming file and key, when there is no such directory, when the family is not known, and for
    whatever the model has that ours cannot have.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable ({error}); give a Hugging Face directory") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{path}: names no model_type; give a Hugging Face directory")
    target = _target(str(content["model_type"]), path)
    try:
        parsed = target.parse(content)
        model = ModelConfig.model_validate(parsed["model"])
        moe = MoEConfig.model_validate(parsed["moe"]) if "moe" in parsed else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: gives {place} = {first['input']!r:.60}: {first['msg']}") from error
    dense = "v3" if isinstance(model.attention, LatentAttention) else "v1"
    generation = "v2" if moe and dense == "v1" else dense
    return Sections(directory, content, target, {"generation": generation, **parsed}, model, moe)


def run_defaults(directory: Path) -> dict[str, Any] | None:
    """``Sections.tree`` of a Hugging Face directory; None for any other, such as one of checkpoints."""
    return read_sections(directory).tree if is_hugging_face_directory(directory) else None


def _target(model_type: str, path: Path) -> Target:
    if model_type not in TARGETS:
        meant = nearest(model_type, TARGETS)
        hint = f"did you mean {meant}?" if meant else f"known are {', '.join(TARGETS)}"
        raise ConfigError(f"{path}: model_type {model_type} is not a family that can be read; {hint}")
    return TARGETS[model_type]
