"""The export targets, in the order in which ``--target auto`` tries them."""

from megatron_ds.config.schema import ModelConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets.common import Target
from megatron_ds.hf.targets.cwm import CWM
from megatron_ds.hf.targets.llama import LLAMA
from megatron_ds.hf.targets.mds_dense import MDS_DENSE
from megatron_ds.hf.targets.qwen3 import QWEN3

TARGETS: dict[str, Target] = {target.model_type: target for target in (QWEN3, LLAMA, CWM, MDS_DENSE)}


def choose_target(model: ModelConfig, requested: str = "auto") -> Target:
    """The requested target, or the first that can express ``model``.

    Raises ConfigError with every reason when there is none, and names the targets that could hold the model.
    """
    reasons = {name: target.reasons(model) for name, target in TARGETS.items()}
    able = [name for name, found in reasons.items() if not found]
    if requested == "auto":
        if not able:
            everything = "; ".join(reason for found in reasons.values() for reason in found)
            raise ConfigError(f"--target auto: no target can express this model: {everything}")
        return TARGETS[able[0]]
    if requested not in TARGETS:
        raise ConfigError(f"--target {requested}: unknown; choose auto, {', '.join(TARGETS)}")
    if reasons[requested]:
        fix = f"use --target {' or '.join(able)}" if able else "no target can express this model"
        raise ConfigError(f"--target {requested}: {'; '.join(reasons[requested])}; {fix}")
    return TARGETS[requested]
