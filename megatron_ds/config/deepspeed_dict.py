"""The dictionary that DeepSpeed is given: its own keys, completed where its defaults are a trap.

Optimizer and learning rate schedule stay out, since the engine receives an optimizer object and our schedule sets its
rate; so does Weights & Biases, which has our writer. Nothing of ``megatron_ds`` is passed on.
"""

from typing import Any

from megatron_ds.config.schema import RunConfig

_PASSED_AS_THEY_ARE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "tensorboard",
    "csv_monitor",
    "comet",
    "prescale_gradients",
    "gradient_predivide_factor",
    "dump_state",
    "memory_breakdown",
    "disable_python_gc",
)


def deepspeed_dict(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for a resolved run (deepspeed 0.19.8, ``runtime/config.py``)."""
    tree = config.model_dump(mode="json")
    settings: dict[str, Any] = {key: tree[key] for key in _PASSED_AS_THEY_ARE} | {
        "wandb": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        # With offloading DeepSpeed otherwise insists on its own CPU Adam, which compiles at the first start.
        "zero_force_ds_cpu_optimizer": False,
        # The stock defaults move partitioned activations; recomputation is the model's own business.
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
        },
    }
    if config.steps_per_print is not None:
        settings["steps_per_print"] = config.steps_per_print
    if config.comms_logger.enabled:
        settings["comms_logger"] = tree["comms_logger"]
    wire = config.communication_data_type
    if config.fp16.enabled:
        settings["fp16"] = tree["fp16"]
    if config.bf16.enabled:
        # Both together make the result independent of the ZeRO stage: summed and reduced in fp32 everywhere. Without
        # ZeRO there is no such mode, and in fp16 ZeRO-1 would hide the sum from the reduction of tied weights.
        settings["data_types"] = tree["data_types"]
        wire = wire or "fp32"
    if wire is not None:
        settings["communication_data_type"] = wire
    return settings
