"""The export targets, in the order in which ``--target auto`` tries them."""

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets.common import Target
from megatron_ds.hf.targets.cwm import CWM
from megatron_ds.hf.targets.deepseek_v2 import DEEPSEEK_V2
from megatron_ds.hf.targets.deepseek_v3 import DEEPSEEK_V3
from megatron_ds.hf.targets.ernie4_5_moe import ERNIE4_5_MOE
from megatron_ds.hf.targets.llama import LLAMA
from megatron_ds.hf.targets.mds_dense import MDS_DENSE
from megatron_ds.hf.targets.mds_moe import MDS_MOE
from megatron_ds.hf.targets.mistral import MISTRAL
from megatron_ds.hf.targets.mixtral import MIXTRAL
from megatron_ds.hf.targets.qwen2 import QWEN2
from megatron_ds.hf.targets.qwen3 import QWEN3
from megatron_ds.hf.targets.qwen3_moe import QWEN3_MOE

DENSE_TARGETS = (QWEN3, LLAMA, CWM, MISTRAL, QWEN2, MDS_DENSE)
EXPERT_TARGETS = (ERNIE4_5_MOE, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3, DEEPSEEK_V2, MDS_MOE)
TARGETS: dict[str, Target] = {target.model_type: target for target in (*DENSE_TARGETS, *EXPERT_TARGETS)}


def choose_target(model: ModelConfig, moe: MoEConfig | None = None, requested: str = "auto") -> Target:
    """The requested target, or the first that can express the model; ``moe`` is None for a dense one.

    Raises ConfigError with the reasons when there is none, and names the targets that could hold the model when it is
    not the requested one.
    """
    reasons = {name: target.reasons(model, moe) for name, target in TARGETS.items()}
    able = [name for name, found in reasons.items() if not found]
    if requested == "auto":
        if not able:
            suited = [name for name, target in TARGETS.items() if target.has_experts == (moe is not None)]
            everything = "; ".join(reason for name in suited for reason in reasons[name])
            raise ConfigError(f"--target auto: no target can express this model: {everything}")
        return TARGETS[able[0]]
    if requested not in TARGETS:
        raise ConfigError(f"--target {requested}: unknown; choose auto, {', '.join(TARGETS)}")
    if reasons[requested]:
        fix = f"use --target {' or '.join(able)}" if able else "no target can express this model"
        raise ConfigError(f"--target {requested}: {'; '.join(reasons[requested])}; {fix}")
    return TARGETS[requested]


def place_mtp(target: Target, model: ModelConfig, requested: str = "auto") -> str:
    """Where the blocks of multi-token prediction go: inline, separate (a directory of their own) or drop.

    ``auto`` leaves the main directory one that stock transformers loads without a word: inline at the one depth that
    it knows, else separate; drop for families without a place for them, and for models without any. Raises ConfigError
    when ``requested`` cannot be done.
    """
    if not model.mtp_num_layers or target.mtp is None:
        if requested in ("inline", "separate"):
            reason = f"{target.model_type} has no place for MTP blocks" if model.mtp_num_layers else "there is no block"
            given = f"model.mtp_num_layers is {model.mtp_num_layers}"
            raise ConfigError(f"--mtp {requested}: {reason}: {given}; use --mtp drop, or leave it out")
        return "drop"
    if requested != "auto":
        return requested
    return "inline" if (model.num_layers, model.mtp_num_layers) == (target.mtp.known_num_layers, 1) else "separate"
