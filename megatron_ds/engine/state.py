"""The training state by logical name, whatever optimizer wrapper holds it: what checkpoints save and restore.

Every wrapper keeps fp32 weights and optimizer state in tensors of its own shape: the parameters themselves (ZeRO-0),
one flat shard per parameter group (ZeRO 1-2, bf16), or flat shards per sub-group (ZeRO-3). A ``Slot`` says where a part
of a weight lies in such a tensor; saving and loading are loops over slots, for any optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from megatron_ds.checkpoint.reader import MEAN, WeightSource
from megatron_ds.checkpoint.store import Checkpoint, Fragment
from megatron_ds.parallel.shard import box_of, full_shape, shards_of

if TYPE_CHECKING:  # it looks for the slots here
    from megatron_ds.engine.average import WeightAverage

LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slot:
    """The flat range [start, start + length) of a weight, kept at ``offset`` in the optimizer's tensor ``owner``."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    owner: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """This slot's part of ``owner`` or of a state of the same layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """The part of the full tensor that this rank's parameter covers."""
        return box_of(self.parameter) if shards_of(self.parameter) else tuple((0, size) for size in self.shape)


def slots(engine: DeepSpeedEngine, weights: dict[str, Tensor]) -> Iterator[Slot]:
    """Every part of a parameter whose optimizer state this rank holds."""
    optimizer = engine.optimizer
    for name, parameter in weights.items():
        if not isinstance(parameter, nn.Parameter):
            continue
        if isinstance(optimizer, torch.optim.Optimizer):
            yield Slot(name, parameter, full_shape(parameter), 0, parameter.numel(), parameter, 0)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = engine.groups.index("data") * parameter.partition_numel()
            length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
            owner = optimizer.fp32_partitioned_groups_flat[group]
            yield Slot(name, parameter, tuple(parameter.ds_shape), start, length, owner, offset)
        elif parameter._hp_mapping is not None:
            here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            owner = _shards(optimizer)[parameter._hp_mapping.param_group_index]
            yield Slot(name, parameter, full_shape(parameter), here.start, here.numel, owner, there.start)


def _shards(optimizer) -> list[Tensor]:
    """This rank's flat fp32 shard of each parameter group."""
    if isinstance(optimizer, BF16_Optimizer):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def fragments(
    engine: DeepSpeedEngine, weights: dict[str, Tensor], average: "WeightAverage | None" = None
) -> Iterator[Fragment]:
    """The fragments that this rank writes: each part of each weight, its optimizer state and its mean exactly once."""
    states = _inner(engine).state
    replicated = isinstance(engine.optimizer, torch.optim.Optimizer)
    for name, buffer in weights.items():
        if not isinstance(buffer, nn.Parameter) and engine.groups.holds_first_copy(buffer):
            yield Fragment(name, "weight", tuple(buffer.shape), box_of(buffer), 0, buffer.view(-1))
    for slot in slots(engine, weights):
        if getattr(slot.parameter, "ds_pipe_replicated", False):
            continue
        if replicated and not engine.groups.holds_first_copy(slot.parameter):
            continue
        tensors = {"weight": slot.owner} | {
            kind: value for kind, value in states.get(slot.owner, {}).items() if value.shape == slot.owner.shape
        }
        if average is not None:
            tensors[MEAN] = average.of(slot.owner)
        for kind, tensor in tensors.items():
            yield Fragment(slot.name, kind, slot.shape, slot.box, slot.start, slot.view(tensor))


def counters(engine: DeepSpeedEngine) -> dict:
    """The scalars of the training state: engine counters, the optimizer's step and the fp16 loss scaler."""
    scalars = {
        kind: value.item()
        for state in _inner(engine).state.values()
        for kind, value in state.items()
        if value.ndim == 0
    }
    scaler = vars(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {}
    return {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "optimizer": scalars,
        "loss_scaler": {key: scaler[key] for key in LOSS_SCALER_STATE if key in scaler},
    }


@torch.no_grad()
def restore_weights(engine: DeepSpeedEngine, weights: dict[str, Tensor], checkpoint: WeightSource) -> None:
    """Load the weights and buffers of a checkpoint of any layout, and nothing else."""
    stage_3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    for slot in slots(engine, weights):
        here = slot.view(slot.owner)
        here.copy_(checkpoint.read_range(slot.name, "weight", slot.box, slot.start, slot.length))
        if stage_3:
            slot.parameter.ds_tensor.view(-1)[: slot.length].copy_(here)
    for name, weight in weights.items():
        if not (stage_3 and isinstance(weight, nn.Parameter)):
            values = checkpoint.read_range(name, "weight", box_of(weight), 0, weight.numel())
            weight.copy_(values.view(weight.shape))


@torch.no_grad()
def restore(
    engine: DeepSpeedEngine,
    weights: dict[str, Tensor],
    checkpoint: Checkpoint,
    saved: dict,
    average: "WeightAverage | None" = None,
) -> None:
    """Load weights, optimizer state, ``counters`` and the mean of the weights from a checkpoint of any layout.

    A checkpoint without means lets ``average`` begin with its weights.
    """
    restore_weights(engine, weights, checkpoint)
    if average is not None:
        average.reset()
    states = _inner(engine).state
    for slot in slots(engine, weights):
        for kind in set(checkpoint.kinds(slot.name)) - {"weight"}:
            if kind != MEAN:
                target = states[slot.owner].setdefault(kind, torch.zeros_like(slot.owner, requires_grad=False))
            elif average is not None:
                target = average.of(slot.owner)
            else:
                continue
            slot.view(target).copy_(checkpoint.read_range(slot.name, kind, slot.box, slot.start, slot.length))
        if saved["optimizer"]:
            states[slot.owner].update({k: torch.tensor(v, dtype=torch.float32) for k, v in saved["optimizer"].items()})
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.global_steps = saved["global_steps"]
    engine.skipped_steps = saved["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(saved["loss_scaler"])


def _inner(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
