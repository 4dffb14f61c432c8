"""What every target shares: the Llama layout of names and config.json, and the shape of a target.

A target is data: a model_type, the limits of what it can express, its config.json, how that is read back, and how the
family names and keeps the tensors of a layer. All families here descend from Llama's; what those with experts add is
in ``experts.py``. Stock families also get the keys that transformers 5 renamed in their older spelling, so that
transformers 4, vLLM and llama.cpp read the same directory; what is read may have either.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.config.model_schema import DefaultRope, HybridAttention, LinearRope, Llama3Rope, ModelConfig, YarnRope
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Logical name -> Hugging Face name, outside the layers."""

LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.far_gate.weight": "self_attn.far_gate.weight",
    "attention.far_gate.bias": "self_attn.far_gate.bias",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
"""The same inside ``layers.{i}.`` and ``model.layers.{i}.``."""

LAYER_LETTERS = {"sliding_attention": "L", "full_attention": "G"}
"""Hugging Face's layer_types -> letters of ``model.attention.pattern``."""

ROPE_KINDS = {"default": DefaultRope, "linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}
"""Hugging Face's rope_type -> our section, whose keys have the same names."""


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that config.json and generation_config.json carry."""

    bos: int
    eos: int
    pad: int | None


@dataclass(frozen=True)
class MtpLayout:
    """How a family stores block k of multi-token prediction: as ``model.layers.{num_layers + k}``, with its decoder
    layer under the names of any other and the following beside it."""

    names: Mapping[str, str]
    """Logical name inside a block, but for its decoder layer -> Hugging Face's."""
    embedding: str
    """Hugging Face's name for the copy of the embedding that every block has."""
    output: str
    """The same for the output."""
    architecture: str
    """Name in the config.json of a directory that holds the blocks alone, as vLLM calls the draft model."""
    known_num_layers: int
    """The one number of decoder layers at which transformers itself knows that the next is such a block."""


@dataclass(frozen=True)
class Target:
    """One model family that an export can be written for."""

    model_type: str
    limits: Callable[[ModelConfig, MoEConfig | None], list[str]]
    """Why the family cannot express a model of its side (dense, or with experts), one clause each."""
    config: Callable[[ModelConfig, MoEConfig | None, SpecialIds, str], dict[str, Any]]
    """config.json for (model, its experts, special ids, dtype name such as "bfloat16")."""
    engines: str
    """Which inference engines run it natively, for the model card."""
    parse: Callable[[dict[str, Any]], dict[str, Any]]
    """The inverse: the sections "model" and, with experts, "moe" of our configuration for the content of a config.json
    of either spelling. Raises ConfigError, naming the key, for what our model cannot express."""
    layer_names: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: LAYER_NAMES)
    """Logical name inside a layer -> Hugging Face's. Of stacked experts: the names of one expert's parts, with {expert}
    for its number."""
    kept_fp32: tuple[str, ...] = ()
    """Logical names inside a layer that stay fp32 in an export of any precision, as the family loads them."""
    as_row: tuple[str, ...] = ()
    """Logical names inside a layer of vectors [n] that the family stores as [1, n]."""
    untied: bool = False
    """Whether the output has a weight of its own in every file; a tied model's is the embedding's, written twice."""
    always_shared: bool = False
    """Whether every layer with experts has a shared expert, too; that of a model without is zeros."""
    mtp: MtpLayout | None = None
    """How blocks of multi-token prediction are stored; None when the family has no place for them."""
    code_files: tuple[str, ...] = ()
    """Files of remote_code/ that the directory must carry."""

    @property
    def has_experts(self) -> bool:
        """Whether the family is for models with experts, and for no others."""
        return "mlp.router.weight" in self.layer_names

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values of the family have a bias, always, or else never."""
        return "attention.query.bias" in self.layer_names

    def reasons(self, model: ModelConfig, moe: MoEConfig | None) -> list[str]:
        """Why the family cannot express a model, one clause each; empty when it can. ``moe``: None for a dense one."""
        if moe is None and self.has_experts:
            return [f"{self.model_type} is for models with experts: the configuration has no moe section"]
        if moe is not None and not self.has_experts:
            return [f"{self.model_type} has no experts: moe.num_experts is {moe.num_experts}"]
        return self._bias_reasons(model) + self.limits(model, moe)

    def _bias_reasons(self, model: ModelConfig) -> list[str]:
        if model.add_qkv_bias == self.has_qkv_bias:
            return []
        rule = "always has a bias" if self.has_qkv_bias else "has no bias"
        given = str(model.add_qkv_bias).lower()
        return [f"{self.model_type} {rule} on queries, keys and values alone: model.add_qkv_bias is {given}"]


def layer_types(model: ModelConfig) -> list[str]:
    """Hugging Face's layer_types: one entry per layer, from the repeated pattern."""
    if not isinstance(model.attention, HybridAttention):
        return ["full_attention"] * model.num_layers
    pattern = model.attention.pattern
    names = {letter: name for name, letter in LAYER_LETTERS.items()}
    return [names[pattern[layer % len(pattern)]] for layer in range(model.num_layers)]


def sliding_window(model: ModelConfig) -> int | None:
    """Hugging Face's sliding_window: a key at distance d is seen when d < sliding_window. None without local layers."""
    return model.attention.window + 1 if "sliding_attention" in layer_types(model) else None


def older_spellings(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys that transformers 5 renamed, as transformers 4, vLLM and llama.cpp know them."""
    kind = model.rope_scaling.kind
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, "type": kind, **_rope_settings(model)},
        "torch_dtype": dtype,
    }


def llama_config(model: ModelConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """The keys that all families share, as transformers 5 spells them; nothing is left to a default."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rope_parameters": {
            "rope_type": model.rope_scaling.kind,
            "rope_theta": model.rotary_base,
            **_rope_settings(model),
        },
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "dtype": dtype,
    }


def stock_config(architecture: str, model_type: str, model: ModelConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """What the config.json of every stock family begins with, in both spellings."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **llama_config(model, ids, dtype),
        **older_spellings(model, dtype),
    }


def _rope_settings(model: ModelConfig) -> dict[str, Any]:
    """Settings of the context extension; they have Hugging Face's names, and unset ones are the same everywhere."""
    return model.rope_scaling.model_dump(exclude={"kind"}, exclude_none=True)


def query_key_norm_reasons(family: str, model: ModelConfig, *, has_norm: bool) -> list[str]:
    """A family either always normalises queries and keys or never does."""
    if model.qk_layernorm == has_norm:
        return []
    rule = "always normalises queries and keys" if has_norm else "has no query and key norm"
    return [f"{family} {rule}: model.qk_layernorm is {str(model.qk_layernorm).lower()}"]


def attention_reasons(family: str, model: ModelConfig) -> list[str]:
    """Most families have neither of these: far keys that are weighed, keys made from a latent vector."""
    missing = {"soft_gate": "gate on far keys", "latent": "latent attention"}
    kind = model.attention.kind
    return [f"{family} has no {missing[kind]}: model.attention.kind is {kind}"] if kind in missing else []


def rotary_reasons(family: str, model: ModelConfig, *, interleaved: bool) -> list[str]:
    """A family pairs the channels of a head in one of two ways."""
    if model.rotary_interleaved == interleaved:
        return []
    rule = "turns neighbouring channels as pairs" if interleaved else "turns channels half a head apart as pairs"
    return [f"{family} {rule}: model.rotary_interleaved is {str(model.rotary_interleaved).lower()}"]


def window_reasons(family: str, model: ModelConfig) -> list[str]:
    """Not every family can choose a window layer by layer."""
    if sliding_window(model) is None:
        return []
    return [f"{family} has no per-layer windows: model.attention.kind is hybrid"]


def mixed_window_reasons(family: str, model: ModelConfig) -> list[str]:
    """Some families have one window for all layers, or none."""
    if len(set(layer_types(model))) == 1:
        return []
    pattern = model.attention.pattern
    return [f"{family} has one window for all layers, or none: model.attention.pattern is {pattern}"]


def head_width_reasons(family: str, model: ModelConfig) -> list[str]:
    """transformers' Llama and Cwm refuse a width that the heads do not divide, even with an explicit head_dim."""
    if model.hidden_size % model.num_attention_heads == 0:
        return []
    sizes = f"model.hidden_size is {model.hidden_size}, model.num_attention_heads {model.num_attention_heads}"
    return [f"{family} needs a width that the heads divide: {sizes}"]


def stock_dense_reasons(family: str, model: ModelConfig) -> list[str]:
    """What no dense stock family here has: unusual attention, interleaved rotary pairs."""
    return attention_reasons(family, model) + rotary_reasons(family, model, interleaved=False)


# --- reading a config.json ------------------------------------------------------------------------------------------


def parse_llama(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model section that all families share, for the content of a config.json of either spelling.

    Its defaults are Llama's; a family with others puts them below: ``parse_llama({"rope_theta": 1e6} | config)``.
    Attention, query and key norm, the rotary pairs and biases that it always has are for the family to add. Raises
    ConfigError naming the key that is missing, or that asks for what our model has not.
    """
    require(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    heads = whole_number(config, "num_attention_heads")
    return {
        "num_layers": whole_number(config, "num_hidden_layers"),
        "hidden_size": whole_number(config, "hidden_size"),
        "ffn_hidden_size": whole_number(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": given(config, "num_key_value_heads", heads),
        "add_qkv_bias": False,
        "kv_channels": given(config, "head_dim", whole_number(config, "hidden_size") // heads),
        "max_position_embeddings": whole_number(config, "max_position_embeddings"),
        "vocab_size": whole_number(config, "vocab_size"),
        "norm_epsilon": given(config, "rms_norm_eps", 1e-6),
        "untie_embeddings_and_output_weights": not given(config, "tie_word_embeddings", False),
        **parse_rope(config),
    }


def given(config: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key; the default when it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def whole_number(config: dict[str, Any], *keys: str, least: int = 1) -> int:
    """A setting's value under the first of its spellings that is there.

    Raises ConfigError naming the last, the family's own, when the value is no integer of at least ``least``.
    """
    key = next((key for key in keys if config.get(key) is not None), keys[-1])
    value = config.get(key)
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} is {json.dumps(value)}, but must be an integer, {least} or more")
    return value


def require(config: dict[str, Any], only: dict[str, Any]) -> None:
    """ConfigError naming every key whose value is not the one that our model computes; missing or null counts as it."""
    wrong = [
        f"{key} is {json.dumps(config[key])}, but megatron_ds has only {json.dumps(value)}"
        for key, value in only.items()
        if given(config, key, value) != value
    ]
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}; this model cannot be imported")


def parse_rope(config: dict[str, Any]) -> dict[str, Any]:
    """``rotary_base`` and ``rope_scaling``, from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``.

    The original context is by default the declared one, and YaRN's factor by default what lies between them, as in
    transformers. Raises ConfigError for an extension that our model has not.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("rope_parameters or rope_scaling is not one set of settings for all layers")
    kind = given(rope, "rope_type", given(rope, "type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type is {kind}, but megatron_ds has only {', '.join(ROPE_KINDS)}")
    require(config | rope, {"partial_rotary_factor": 1.0, "truncate": True})
    longest = whole_number(config, "max_position_embeddings")
    name = "original_max_position_embeddings"
    original = given(config, name, given(rope, name, longest))
    known = {k: v for k, v in rope.items() if v is not None} | {name: original}
    if kind == "yarn":
        known = {"factor": longest / original} | known
    scaling = {key: known[key] for key in ROPE_KINDS[kind].model_fields if key in known}
    base = given(rope, "rope_theta", given(config, "rope_theta", 10000.0))
    return {"rotary_base": base, "rope_scaling": scaling | {"kind": kind}}


def parse_windows(kinds: list[str], sliding_window: int | None) -> dict[str, Any]:
    """The attention section for Hugging Face's layer_types and sliding_window: the shortest pattern that repeats.

    Full when no layer slides. Raises ConfigError for kinds of layers that our model has not.
    """
    if unknown := sorted(set(kinds) - set(LAYER_LETTERS)):
        raise ConfigError(f"layer_types has {', '.join(unknown)}, but megatron_ds has only {', '.join(LAYER_LETTERS)}")
    if "sliding_attention" not in kinds:
        return {"kind": "full"}
    if sliding_window is None:
        raise ConfigError("layer_types has sliding_attention, but sliding_window is not set")
    letters = "".join(LAYER_LETTERS[kind] for kind in kinds)
    period = next(n for n in range(1, len(letters) + 1) if (letters[:n] * len(letters)).startswith(letters))
    return {"kind": "hybrid", "pattern": letters[:period], "window": sliding_window - 1}


def parse_window(num_layers: int, window: int | None) -> dict[str, Any]:
    """The attention section for one ``sliding_window`` of all layers, or for none."""
    return parse_windows(["full_attention" if window is None else "sliding_attention"] * num_layers, window)
