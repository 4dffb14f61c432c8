"""What the targets with experts share: names of their tensors, keys of config.json both ways, and reasons.

On disk every expert has tensors of its own, as all engines expect; transformers 5 stacks them while it loads. A family
whose names include a router bias has one in every sparse layer, so a model without gets zeros.
"""

import json
from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets.common import LAYER_NAMES, attention_reasons, whole_number

EXPERT_LAYER_NAMES = LAYER_NAMES | {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down": ("mlp.experts.{expert}.down_proj.weight",),
}
"""Names of a layer with experts, as Qwen's and DeepSeek's families have them."""

SHARED_EXPERT_NAMES = {
    "mlp.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    "mlp.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}


def expert_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Feed-forward width of one routed expert."""
    return moe.moe_ffn_hidden_size or model.ffn_size


def dense_layers(model: ModelConfig, moe: MoEConfig) -> list[int]:
    """Layers that have no experts."""
    return [layer for layer in range(model.num_layers) if not moe.is_moe_layer(layer)]


def expert_config(moe: MoEConfig) -> dict[str, Any]:
    """Keys that families with experts share; the number of experts as transformers 5 and as 4 spell it.

    Balancing losses are training's: a fine-tuning in transformers starts with the coefficient that this run had.
    """
    return {
        "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff,
    }


def plain_router_reasons(family: str, model: ModelConfig, moe: MoEConfig) -> list[str]:
    """What no stock family with a softmax router has."""
    router = moe.router
    found = attention_reasons(family, model)
    if router.kind != "softmax":
        found.append(f"{family} scores experts by softmax: moe.router.kind is {router.kind}")
    if router.fine == "refine":
        found.append(f"{family} has no refine stage: moe.router.fine is refine")
    if router.num_groups is not None:
        found.append(f"{family} has no groups of experts: moe.router.num_groups is {router.num_groups}")
    if router.scaling_factor != 1:
        found.append(
            f"{family} does not scale the experts' weights: moe.router.scaling_factor is {router.scaling_factor}"
        )
    return found


def normalised_weight_reasons(family: str, moe: MoEConfig) -> list[str]:
    """Some families always divide by the sum of the chosen experts' weights."""
    if moe.router.norm_topk_prob:
        return []
    return [f"{family} always normalises the experts' weights: moe.router.norm_topk_prob is false"]


def bias_reasons(family: str, moe: MoEConfig) -> list[str]:
    """Some families select by the scores alone."""
    return [f"{family} has no balancing bias: moe.router.fine is bias"] if moe.router.fine == "bias" else []


def shared_expert_reasons(family: str, moe: MoEConfig) -> list[str]:
    """Some families have no shared expert."""
    width = moe.moe_shared_expert_intermediate_size
    if width is None:
        return []
    return [f"{family} has no shared expert: moe.moe_shared_expert_intermediate_size is {width}"]


# --- reading a config.json ------------------------------------------------------------------------------------------


def one_of(config: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    """The value of a key that names one of several ways; ConfigError when our model has not this one."""
    if config[key] not in known:
        raise ConfigError(f"{key} is {json.dumps(config[key])}, but megatron_ds has only {', '.join(known)}")
    return config[key]


def parse_layers(sparse: list[bool], key: str) -> dict[str, Any]:
    """``moe_layer_freq`` for whether each layer has experts; ConfigError naming ``key`` when none has."""
    if not any(sparse):
        raise ConfigError(f"{key} leaves no layer with experts; this model cannot be imported")
    return {"moe_layer_freq": 1 if all(sparse) else [int(has_experts) for has_experts in sparse]}


def parse_shared(config: dict[str, Any], key: str, width: int) -> dict[str, Any]:
    """The shared expert for a number of them, each as wide as a routed one."""
    return {"moe_shared_expert_intermediate_size": whole_number(config, key, least=0) * width or None}


def parse_groups(config: dict[str, Any]) -> dict[str, Any]:
    """Groups of the router's coarse stage; one group is none."""
    groups = whole_number(config, "n_group")
    return {"num_groups": groups, "group_topk": whole_number(config, "topk_group")} if groups > 1 else {}
