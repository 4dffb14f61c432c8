"""What the dense Qwen families share: layers that slide or not, in the keys that say so, and who heeds them.

Sliding layers need use_sliding_window true beside layer_types: with the families' default, false, transformers forgets
the window and fails at the first forward pass.
"""

from typing import Any

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.hf.targets.common import given, layer_types, parse_windows, sliding_window

ENGINES = (
    "transformers. With full attention in every layer also vLLM and llama.cpp; with sliding layers those two "
    "may ignore the windows, so run vLLM with --model-impl transformers."
)
"""Which inference engines run a model of these families, for the model card."""

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096}
"""What these families take for keys that are not there."""


def window_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json. vLLM asserts that max_window_layers equals the depth on mixed layers."""
    window = sliding_window(model)
    return {
        "layer_types": layer_types(model),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers,
    }


def parse_window_config(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The attention section for these keys, of a config that holds ``DEFAULTS``.

    Without layer_types, the layers from max_window_layers on slide; none does unless use_sliding_window is true.
    """
    window = config["sliding_window"] if given(config, "use_sliding_window", False) else None
    first = num_layers if window is None else given(config, "max_window_layers", 28)
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return parse_windows(given(config, "layer_types", kinds), window)
