"""The training state by logical name, whatever optimizer wrapper holds it: what checkpoints save and restore.

Every wrapper keeps fp32 weights and optimizer state in tensors of its own shape: the parameters themselves (ZeRO-0),
one flat shard per parameter group (ZeRO 1-2, bf16), or flat shards per sub-group (ZeRO-3). A ``Slot`` says where a part
of a weight lies in such a tensor; saving and loading are loops over slots, for any optimizer. A rank reads what its
slots need and nothing else; whole parameters beside the shards are exchanged as after a step. What a resumed run cannot
continue exactly, because its layout is another one, ``changed_on_load`` says in words.
"""

from collections import defaultdict
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from megatron_ds.checkpoint.reader import MEAN, RANK_STATE, WeightSource
from megatron_ds.checkpoint.store import Checkpoint, Fragment
from megatron_ds.config.moe_schema import Dropless
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError
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


def _owners(optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's on this rank, also those in which no weight lies: padding, anchors."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return _shards(optimizer)


def _buffers(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those of the weights that no optimizer changes: the routers' biases and balances."""
    return ((name, weight) for name, weight in weights.items() if not isinstance(weight, nn.Parameter))


def fragments(
    engine: DeepSpeedEngine, weights: dict[str, Tensor], average: "WeightAverage | None" = None
) -> Iterator[Fragment]:
    """The fragments that this rank writes: each part of each weight, its optimizer state and its mean exactly once."""
    states = _inner(engine).state
    replicated = isinstance(engine.optimizer, torch.optim.Optimizer)
    for name, buffer in _buffers(weights):
        if engine.groups.holds_first_copy(buffer):
            yield Fragment(name, "weight", tuple(buffer.shape), box_of(buffer), 0, buffer.view(-1))
    for slot in slots(engine, weights):
        tied_copy = getattr(slot.parameter, "ds_pipe_replicated", False)
        if tied_copy or not engine.groups.holds_first_copy(slot.parameter, of_data=replicated):
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
    """Load the weights and buffers of a checkpoint of any layout, and nothing else; collective over the data ranks."""
    optimizer = engine.optimizer
    for slot in slots(engine, weights):
        here = slot.view(slot.owner)
        here.copy_(checkpoint.read_range(slot.name, "weight", slot.box, slot.start, slot.length))
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            slot.parameter.ds_tensor.view(-1)[: slot.length].copy_(here)
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1-2 and bf16: whole parameters, gathered from the shards
        optimizer.update_lp_params()
    for name, buffer in _buffers(weights):
        values = checkpoint.read_range(name, "weight", box_of(buffer), 0, buffer.numel())
        buffer.copy_(values.view(buffer.shape))


@torch.no_grad()
def restore(
    engine: DeepSpeedEngine,
    weights: dict[str, Tensor],
    checkpoint: Checkpoint,
    saved: dict,
    average: "WeightAverage | None" = None,
) -> None:
    """Load weights, optimizer state, ``counters`` and the mean of the weights from a checkpoint of any layout.

    Collective over the data ranks. A checkpoint without means lets ``average`` begin with its weights; one from before
    the first step has no optimizer state, and needs none.

    Args:
        saved: what ``counters`` returned when the checkpoint was written; empty when it has weights alone.

    Raises:
        CheckpointError: the optimizer's state is missing, or is another optimizer's. Nothing has been loaded then.
    """
    kept = _kept_state(_inner(engine), _owners(engine.optimizer)[0])
    stepped = not saved or saved["global_steps"] > saved["skipped_steps"]
    if stepped:
        _require_state(engine, weights, checkpoint, saved, kept)
    restore_weights(engine, weights, checkpoint)
    if average is not None:
        average.reset()
    states = _inner(engine).state
    for owner in _owners(engine.optimizer) if stepped else ():
        states[owner] = {
            kind: torch.zeros_like(owner, dtype=one.dtype, requires_grad=False)
            if one.ndim
            else torch.tensor(saved["optimizer"][kind], dtype=one.dtype, device=one.device)
            for kind, one in kept.items()
        }
    for slot in slots(engine, weights):
        targets = {kind: tensor for kind, tensor in states.get(slot.owner, {}).items() if tensor.ndim}
        if average is not None and MEAN in checkpoint.kinds(slot.name):
            targets[MEAN] = average.of(slot.owner)
        for kind, target in targets.items():
            slot.view(target).copy_(checkpoint.read_range(slot.name, kind, slot.box, slot.start, slot.length))
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.global_steps = saved["global_steps"]
    engine.skipped_steps = saved["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(saved["loss_scaler"])


def files_needed(engine: DeepSpeedEngine, weights: dict[str, Tensor], checkpoint: Checkpoint) -> set[str]:
    """The files of a checkpoint that this rank reads to restore, from its headers alone."""
    parts = [
        (slot.name, kind, slot.box, slot.start, slot.length)
        for slot in slots(engine, weights)
        for kind in checkpoint.kinds(slot.name)
    ]
    parts += [(name, "weight", box_of(buffer), 0, buffer.numel()) for name, buffer in _buffers(weights)]
    files = {file for part in parts for file in checkpoint.overlapping(*part)}
    return files | {RANK_STATE.format(rank=engine.groups.rank)}


def _kept_state(optimizer: torch.optim.Optimizer, owner: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of a tensor, by its own names: a copy of it takes a step with a single element.

    Scalars that belong to a tensor as a whole ("step") have no dimension.
    """
    element = torch.zeros([1] * owner.ndim, dtype=owner.dtype, device=owner.device, requires_grad=True)
    element.grad = torch.zeros_like(element)
    twin = copy(optimizer)
    twin.state, twin.param_groups = defaultdict(dict), [optimizer.param_groups[0] | {"params": [element]}]
    twin.step()
    return twin.state[element]


def _require_state(
    engine: DeepSpeedEngine, weights: dict[str, Tensor], checkpoint: Checkpoint, saved: dict, kept: dict[str, Tensor]
) -> None:
    """CheckpointError unless the checkpoint has just what the optimizer keeps, of every weight that this rank needs."""
    scalars = set(saved["optimizer"]) if saved else set()
    for slot in slots(engine, weights):
        states = set(checkpoint.kinds(slot.name)) - {"weight", MEAN}
        if states | scalars != set(kept):
            held = ", ".join(sorted(states | scalars)) if states else "no optimizer state"
            raise CheckpointError(
                f"{checkpoint.path}: holds {held} of {slot.name}, but {type(_inner(engine)).__name__} continues from "
                f"{', '.join(sorted(kept)) or 'nothing'}; give the optimizer that wrote it, or begin a new run with "
                f"its weights alone (--finetune)"
            )


def changed_on_load(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """What a run that resumes a checkpoint does not continue exactly, a line each; none when nothing changes.

    Weights, optimizer, schedules and the order of the data never depend on the layout. What is drawn or balanced per
    micro-batch, or on each rank by itself, can.

    Args:
        checkpoint: of the same model.
        config: of the run that loads it, resolved.
    """
    ours, old = config.megatron_ds, checkpoint.config
    model, moe, tensor = ours.model, ours.moe, ours.parallel.tensor_model_parallel_size
    micro, old_micro = config.train_micro_batch_size_per_gpu, old["train_micro_batch_size_per_gpu"]
    data = config.train_batch_size // micro // config.gradient_accumulation_steps
    ranks, old_ranks = data * tensor * ours.parallel.pipeline_model_parallel_size, checkpoint.manifest.world_size
    old_tensor = old["megatron_ds"]["parallel"]["tensor_model_parallel_size"]
    sequences = f"{_count(micro, 'sequence')} instead of {old_micro}"
    draws = model.hidden_dropout or model.attention_dropout or (moe and moe.moe_input_jitter_eps)
    lines = []
    if draws and ranks > old_ranks:
        new = f"rank {old_ranks}" if ranks == old_ranks + 1 else f"ranks {old_ranks}-{ranks - 1}"
        wrote = _count(old_ranks, "rank")
        lines.append(f"random streams start anew for {new}: the checkpoint was written by {wrote}")
    if draws and micro != old_micro:
        lines.append(f"dropout masks are others: they are drawn per micro-batch, of {sequences}")
    if model.attention_dropout and tensor != old_tensor:
        here = f"{_count(tensor, 'tensor-parallel rank')} instead of {old_tensor}"
        lines.append(f"masks of attention dropout are others: they are drawn by each of {here}")
    if moe and micro != old_micro and (moe.moe_aux_loss_coeff or not isinstance(moe.capacity, Dropless)):
        lines.append(f"experts are balanced over other tokens: those of a micro-batch, of {sequences}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _inner(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
