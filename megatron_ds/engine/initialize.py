"""Build the engine of a run: the model's layers for this rank, the optimizer, and DeepSpeed around them.

``deepspeed.initialize`` hard-codes its engine classes, so this does what it does for ours. Ranks that hold the whole
model run under ``PlainEngine`` (ZeRO 0-3); those that share it, tensor or pipeline, under ``TableEngine`` (ZeRO 0-1).
"""

import logging
import warnings

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import zero
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from megatron_ds.config.deepspeed_dict import deepspeed_dict
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import MegatronDs, RunConfig
from megatron_ds.engine.gradients import Objective
from megatron_ds.engine.module import StageModule
from megatron_ds.engine.pipeline_engine import TableEngine
from megatron_ds.engine.plain_engine import PlainEngine
from megatron_ds.errors import ConfigError
from megatron_ds.model.cost import layer_costs
from megatron_ds.model.decoder import Decoder, layer_list
from megatron_ds.model.init import initialize
from megatron_ds.optim.optimizers import build_optimizer
from megatron_ds.parallel.groups import Groups
from megatron_ds.parallel.shard import shards_of
from megatron_ds.pipeline.partition import stage_bounds
from megatron_ds.pipeline.schedule import SCHEDULES

Engine = PlainEngine | TableEngine


def build_engine(config: RunConfig, groups: Groups, objective: Objective) -> tuple[Engine, dict[str, Tensor]]:
    """The engine, and this rank's weights under their logical names: parameters, and the routers' buffers.

    Args:
        config: resolved configuration.
        groups: process groups of the run.
        objective: logits and batch to the loss sum.

    Raises:
        ConfigError: the device cannot compute in the configured precision.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch)\.")
    if config.fp16.enabled and not get_accelerator().is_fp16_supported():
        raise ConfigError("fp16.enabled = true: this device has no fp16 arithmetic; leave it out, or set bf16.enabled")
    ours = config.megatron_ds
    shared = groups.topology.pipe * groups.topology.tensor > 1
    module = stage_module(ours, groups) if shared else whole_model(ours, groups)
    parameters = {name: weight for name, weight in logical_weights(module).items() if isinstance(weight, nn.Parameter)}
    initialize(parameters.items(), ours.model, ours.training.seed)
    for weight in parameters.values():  # DeepSpeed's name for it: its bf16 wrapper takes a norm before it uses ours
        weight.tensor_model_parallel = any(shard.axis == "tensor" for shard in shards_of(weight))
    anchors = [(name, anchor) for name, anchor in module.named_parameters() if name.startswith("anchor.")]

    settings = deepspeed_dict(config)
    mpu = module.mpu() if shared else None
    deepspeed_groups.mpu = mpu  # DeepSpeed keeps it in a global, where an earlier engine's may still be
    groups.tell_deepspeed_about_experts()
    zero.partition_parameters.shutdown_init_context()
    arguments = {
        "args": None,
        "model": module,
        "optimizer": build_optimizer([*parameters.items(), *anchors], config.optimizer, lr=config.optimizer.params.lr),
        "mpu": mpu,
        "config": settings,
        "config_class": DeepSpeedConfig(settings, mpu),
        "groups": groups,
        "objective": objective,
        "seed": ours.training.seed,
        "model_config": ours.model,
        "moe": ours.moe,
    }
    if shared:
        engine: Engine = TableEngine(**arguments, schedule=SCHEDULES[ours.parallel.schedule.kind])
    else:
        engine = PlainEngine(**arguments)
    zero.partition_parameters.restore_init_context()
    engine.install_global_norm(parameter_names(ours.model, ours.moe), parameters)
    return engine, logical_weights(module)  # asked for again: DeepSpeed's cast of the module has replaced the buffers


def whole_model(ours: MegatronDs, groups: Groups) -> Decoder:
    """All layers on this rank."""
    recompute = ours.training.recompute_granularity
    return Decoder(ours.model, ours.moe, recompute=recompute, groups=groups).to(groups.device)


def stage_module(ours: MegatronDs, groups: Groups) -> StageModule:
    """This rank's share of the layers, as the schedule places them."""
    model, parallel = ours.model, ours.parallel
    entries, costs = layer_list(model, ours.moe, groups), layer_costs(model, ours.moe)
    assert len(costs) == len(entries), "every layer has a cost"
    bounds = stage_bounds(
        costs,
        model.num_layers,
        groups.topology.pipe * parallel.num_chunks,
        parallel.pipeline_model_parallel_layout,
    )
    placement = SCHEDULES[parallel.schedule.kind].placement
    return StageModule(entries, bounds, placement, groups, ours.training.recompute_granularity)


def logical_weights(module: Decoder | StageModule) -> dict[str, Tensor]:
    """Parameters and buffers of a module under the names that checkpoints use."""
    if isinstance(module, StageModule):
        return module.logical_names()
    return dict((*module.named_parameters(), *module.named_buffers()))


def parameter_names(model: ModelConfig, moe: MoEConfig | None) -> list[str]:
    """Logical names of all parameters of the model, in layer order."""
    with torch.device("meta"):
        return [name for name, _ in Decoder(model, moe).named_parameters()]
