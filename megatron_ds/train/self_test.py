"""Does this topology train the model that one process trains? One step of a shrunk copy of the run tells.

The copy keeps what decides how ranks work together (axes, schedule, kinds of attention, router and dispatcher, ZeRO
stage) and makes everything else small. Its gradients, read from the optimizer under their logical names, are compared
with plain autograd over the whole batch in one process. When they differ, smaller layouts on the same ranks, each with
one axis alone, find the axis at fault.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.config.model_schema import LatentAttention, ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.resolve import resolve
from megatron_ds.config.schema import ParallelConfig, RunConfig
from megatron_ds.data.loader import Batch
from megatron_ds.engine.initialize import build_engine
from megatron_ds.engine.state import fragments
from megatron_ds.errors import SelfTestError
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.init import initialize
from megatron_ds.parallel.groups import Groups, build_groups
from megatron_ds.train.objective import pretraining

TOLERANCE = 1e-5
"""Largest allowed |difference| of a gradient, relative to the largest entry of the same weight's."""

MTP_WEIGHT = 0.3


@dataclass(frozen=True)
class Result:
    """How far the gradients of a layout are from those of one process."""

    error: float
    """Largest |difference| over all weights, each relative to its largest entry; infinite for a missing weight."""
    weight: str
    """Logical name of the weight where it is."""

    @property
    def passed(self) -> bool:
        """Whether that is rounding."""
        return self.error <= TOLERANCE


def self_test(config: RunConfig, groups: Groups) -> str:
    """Compare the run's topology with one process; collective over the world.

    Returns:
        One line for the user, the same on every rank.

    Raises:
        SelfTestError: they differ; the message names the axis at fault.
    """
    started = time.perf_counter()
    parallel = config.megatron_ds.parallel
    result = compare(shrunk(config, groups.world_size, parallel, accumulation=_micro_batches(parallel)), groups)
    seconds = time.perf_counter() - started
    layout = groups.topology.describe()
    if not result.passed:
        raise SelfTestError(
            f"self-test FAIL: {_fault(config, groups)} at fault; gradients of {layout} differ from one rank's by "
            f"{result.error:.1e} of the largest entry ({result.weight}); leave that axis out, and report this"
        )
    return f"self-test PASS: {layout}; largest gradient error {result.error:.1e} ({result.weight}), {seconds:.1f} s"


def compare(config: RunConfig, groups: Groups) -> Result:
    """Gradients of one step under a layout against one process; collective over the world."""
    ours, theirs = step_gradients(config, groups), None
    if groups.rank == 0:
        theirs = one_process_gradients(config, groups)
    worst = Result(0.0, "")
    for name, reference in (theirs or {}).items():
        difference = (ours[name] - reference).abs().max().item() if name in ours else math.inf
        error = difference / max(reference.abs().max().item(), 1e-30)
        if not error <= worst.error:
            worst = Result(error if error == error else math.inf, name)
    return groups.agree(worst)


def _micro_batches(parallel: ParallelConfig) -> int:
    """Accumulation of the test: more than one, and what every schedule can take."""
    return max(2, parallel.pipeline_model_parallel_size)


def _fault(config: RunConfig, groups: Groups) -> str:
    """Which axis, alone, already goes wrong."""
    parallel = config.megatron_ds.parallel
    world = groups.world_size

    def fails(layout: ParallelConfig, accumulation: int) -> bool:
        return not compare(shrunk(config, world, layout, accumulation), build_groups(layout)).passed

    for axis, layout in _single_axes(parallel):
        if fails(layout, 1):
            return axis
        if fails(layout, _micro_batches(parallel)):
            return "gradient accumulation"
    if parallel.schedule.kind != "1f1b":
        pipeline = ParallelConfig(
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            schedule=parallel.schedule,
            num_virtual_stages_per_pipeline_rank=parallel.num_virtual_stages_per_pipeline_rank,
        )
        if fails(pipeline, _micro_batches(parallel)):
            return f"the {parallel.schedule.kind} schedule"
    return "no axis alone, but their combination is"


def _single_axes(parallel: ParallelConfig) -> Iterator[tuple[str, ParallelConfig]]:
    """The data axis, and every other axis that is in use, alone with it."""
    yield "data parallelism", ParallelConfig()
    if parallel.tensor_model_parallel_size > 1:
        sizes = {"tensor_model_parallel_size": parallel.tensor_model_parallel_size}
        yield "tensor parallelism", ParallelConfig(**sizes)
        if parallel.sequence_parallel:
            yield "sequence parallelism", ParallelConfig(**sizes, sequence_parallel=True)
    if parallel.pipeline_model_parallel_size > 1:
        yield (
            "pipeline parallelism",
            ParallelConfig(pipeline_model_parallel_size=parallel.pipeline_model_parallel_size),
        )
    if parallel.expert_model_parallel_size > 1:
        yield (
            "expert parallelism",
            ParallelConfig(
                expert_model_parallel_size=parallel.expert_model_parallel_size,
                expert_ranks_per_node=parallel.expert_ranks_per_node,
            ),
        )


# --- the shrunk copy ------------------------------------------------------------------------------------------------


def shrunk(config: RunConfig, world_size: int, layout: ParallelConfig, accumulation: int) -> RunConfig:
    """A small copy of a run under a layout; fp32, one sequence per micro-batch, no clipping, no randomness."""
    ours, tensor = config.megatron_ds, config.megatron_ds.parallel.tensor_model_parallel_size
    data = world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    stages = ours.parallel.pipeline_model_parallel_size * ours.parallel.num_chunks
    moe = _small_experts(ours.moe, ours.parallel, stages) if ours.moe else None
    tree = config.model_dump(mode="json") | {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    tree["megatron_ds"] |= {
        "model": _small_model(ours.model, tensor, stages).model_dump(mode="json"),
        "moe": moe.model_dump(mode="json") if moe else None,
        "parallel": layout.model_copy(update={"pipeline_model_parallel_layout": None}).model_dump(mode="json"),
        "training": {"seed": ours.training.seed, "recompute_granularity": ours.training.recompute_granularity},
    }
    return resolve(
        RunConfig.model_validate(tree), data * layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    )


def _small_model(model: ModelConfig, tensor: int, stages: int) -> ModelConfig:
    """Sizes that every axis of the run divides."""
    heads = 2 * tensor
    share = model.num_attention_heads // model.num_kv_heads
    changes = {
        "num_layers": max(2, stages),
        "hidden_size": 32,
        "ffn_hidden_size": 8 * tensor,
        "num_attention_heads": heads,
        "num_query_groups": max(1, heads // share),
        "kv_channels": 8,
        "seq_length": 8 * tensor,
        "max_position_embeddings": max(model.max_positions, 8 * tensor),
        "vocab_size": 32 * tensor - 3,
        "make_vocab_size_divisible_by": 4 * tensor,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights that are not tiny: rounding would look large beside small gradients.
        "init_method_std": 0.1,
    }
    if isinstance(model.attention, LatentAttention):
        small = {"kv_lora_rank": 12, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
        compressed = {"q_lora_rank": 16 if model.attention.q_lora_rank else None}
        changes |= {"num_query_groups": None, "attention": model.attention.model_copy(update=small | compressed)}
    elif hasattr(model.attention, "window"):
        changes["attention"] = model.attention.model_copy(update={"window": 5})
    return model.model_copy(update=changes)


def _small_experts(moe: MoEConfig, parallel: ParallelConfig, stages: int) -> MoEConfig:
    """A few experts per rank; groups stay, if there are any, with two experts each."""
    experts = 4 * parallel.expert_model_parallel_size
    topk = min(moe.moe_router_topk, 2)
    groups = (
        {"num_groups": experts // 2, "group_topk": min(moe.router.group_topk or 1, 2)} if moe.router.num_groups else {}
    )
    depth = max(2, stages)
    return moe.model_copy(
        update={
            "num_experts": experts,
            "moe_router_topk": topk,
            "moe_ffn_hidden_size": 8 * parallel.expert_tensor_parallel_size,
            "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size
            and 8 * parallel.tensor_model_parallel_size,
            "moe_layer_freq": (0, *(1,) * (depth - 1)) if not moe.is_moe_layer(0) else 1,
            "moe_input_jitter_eps": 0.0,
            "router": moe.router.model_copy(update={"refine_candidates": None, **groups}),
        }
    )


# --- gradients ------------------------------------------------------------------------------------------------------


def step_gradients(config: RunConfig, groups: Groups) -> dict[str, Tensor]:
    """Gradients of one step under the layout of ``groups``, whole and by logical name, on rank 0."""
    engine, weights = build_engine(config, groups, pretraining(config.megatron_ds.model, groups.tensor))
    batches = [
        synthetic_batch(config, number * groups.topology.data + groups.index("data"))
        for number in range(config.gradient_accumulation_steps)
    ]
    batches = [batch.to(groups.device) for batch in batches]
    engine.set_learning_rate(0.0)
    engine.train_step(batches, num_counted=_num_counted(config), step=0, mtp_weight=MTP_WEIGHT)
    beta = config.optimizer.params.betas[0]
    # After the first step, Adam's first moment is (1 - beta) times the gradient, wherever the optimizer keeps it.
    mine = [
        (fragment.name, fragment.shape, fragment.box, fragment.start, fragment.tensor.cpu() / (1 - beta))
        for fragment in fragments(engine, weights)
        if fragment.kind == "exp_avg"
    ]
    whole: dict[str, Tensor] = {}
    for part in groups.gather_objects(mine):
        for name, shape, box, start, values in part:
            gradient = whole.setdefault(name, torch.zeros(shape))
            view = gradient[tuple(slice(begin, end) for begin, end in box)]
            flat = view.flatten()
            flat[start : start + len(values)] = values
            view.copy_(flat.view_as(view))
    return whole


def one_process_gradients(config: RunConfig, groups: Groups) -> dict[str, Tensor]:
    """The same by plain autograd: all micro-batches of all data ranks, one after another."""
    ours, number = config.megatron_ds, config.train_batch_size
    decoder = Decoder(ours.model, ours.moe).to(groups.device).train()
    initialize(decoder.named_parameters(), ours.model, ours.training.seed)
    objective = pretraining(ours.model)
    for index in range(number):
        batch = synthetic_batch(config, index).to(groups.device)
        logits = decoder(
            batch.token_BS,
            batch.document_BS,
            batch.position_BS,
            step=0,
            micro_batch=index,
            auxiliary_scale=1 / number,
            next_token_BS=batch.label_BS if ours.model.mtp_num_layers else None,
        )
        (objective(logits, batch).total(MTP_WEIGHT) / _num_counted(config)).backward()
    return {name: parameter.grad.cpu() for name, parameter in decoder.named_parameters()}


def synthetic_batch(config: RunConfig, index: int) -> Batch:
    """Sequence ``index`` of the global batch: random tokens in two documents, some targets not counted."""
    model = config.megatron_ds.model
    generator = torch.Generator().manual_seed(index)
    token_B1 = torch.randint(model.vocab_size, (1, model.seq_length + 1), generator=generator)
    position_BS = torch.arange(model.seq_length).expand(1, -1)
    border = model.seq_length // 2 + index % 3 - 1
    document_BS = (position_BS >= border).long()
    return Batch(
        token_BS=token_B1[:, :-1],
        label_BS=token_B1[:, 1:],
        counted_BS=torch.rand(1, model.seq_length, generator=generator) < 0.8,
        document_BS=document_BS,
        position_BS=position_BS - border * document_BS,
    )


def _num_counted(config: RunConfig) -> int:
    return sum(synthetic_batch(config, index).num_counted for index in range(config.train_batch_size))
