"""Rules of the parallel axes: tensor ranks, pipelines, their virtual stages; in the form that ``rules.py`` describes.

A topology that does not fit the number of ranks is answered with the nearest ones that do. They are found by trying:
the rules of this file judge each candidate.
"""

from collections.abc import Iterator
from itertools import islice
from math import lcm, log2

from megatron_ds.config.moe_schema import has_experts
from megatron_ds.config.problems import Problem, divisors, either, problem
from megatron_ds.config.resolve import data_parallel_size, nearest_multiples
from megatron_ds.config.schema import RunConfig

_TENSOR, _PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
_EXPERT_TENSOR, _CHUNKS = "parallel.expert_tensor_parallel_size", "parallel.num_virtual_stages_per_pipeline_rank"
_LAYOUT, _SCHEDULE = "parallel.pipeline_model_parallel_layout", "parallel.schedule.kind"
_SUGGESTIONS = 3
"""How many topologies a message names."""


# --- tensor ranks ---------------------------------------------------------------------------------------------------


def matrices_are_whole(config: RunConfig) -> Iterator[Problem]:
    ours = config.megatron_ds
    if ours.generation != "v3" and ours.parallel.tensor_model_parallel_size > 1:
        rule = f"generation {ours.generation} has no tensor parallelism"
        fix = 'set it to 1, or generation to "v3"'
        yield problem(config, _TENSOR, rule, fix, "generation")


def tensor_ranks_divide_the_heads(config: RunConfig) -> Iterator[Problem]:
    model, ranks = config.megatron_ds.model, config.megatron_ds.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_kv_heads
    if heads % ranks:
        rule = f"must divide num_attention_heads {heads}"
        yield problem(config, _TENSOR, rule, f"choose {either(divisors(heads))}", "model.num_attention_heads")
    elif groups % ranks and ranks % groups:
        rule = f"must divide num_query_groups {groups}, or be a multiple of it"
        legal = [size for size in divisors(heads) if groups % size == 0 or size % groups == 0]
        reads = ("model.num_attention_heads", "model.num_query_groups")
        yield problem(config, _TENSOR, rule, f"choose {either(legal)}", *reads)


def tensor_ranks_divide_the_widths(config: RunConfig) -> Iterator[Problem]:
    ours = config.megatron_ds
    model, moe, parallel = ours.model, ours.moe, ours.parallel
    ranks = parallel.tensor_model_parallel_size
    widths: dict[str, tuple[int, int]] = {}
    if any(not has_experts(model, moe, index) for index in range(model.num_layers)):
        widths["model.ffn_hidden_size"] = model.ffn_size, ranks
    if moe is not None:
        widths["moe.moe_shared_expert_intermediate_size"] = moe.moe_shared_expert_intermediate_size or 0, ranks
        expert_width = moe.moe_ffn_hidden_size or model.ffn_size
        widths["moe.moe_ffn_hidden_size"] = expert_width, parallel.expert_tensor_parallel_size
    for where, (width, size) in widths.items():
        if width % size:
            rule = f"the width {width} must be a multiple of the {size} tensor-parallel ranks that share it"
            reads = ("model.ffn_hidden_size", "model.hidden_size", "moe.moe_layer_freq", _TENSOR, _EXPERT_TENSOR)
            yield problem(config, where, rule, f"set it to {nearest_multiples(width, size)}", *reads)


def tensor_ranks_divide_the_vocabulary(config: RunConfig) -> Iterator[Problem]:
    model, ranks = config.megatron_ds.model, config.megatron_ds.parallel.tensor_model_parallel_size
    unit = model.make_vocab_size_divisible_by
    # Before the tokenizer is read, the unit alone can promise it.
    if (model.padded_vocab_size if model.vocab_size else unit) % ranks:
        rule = f"the padded vocabulary must be a multiple of tensor_model_parallel_size {ranks}"
        fix = f"set it to {lcm(unit, ranks)}"
        yield problem(config, "model.make_vocab_size_divisible_by", rule, fix, "model.vocab_size", _TENSOR)


def tensor_ranks_divide_the_sequence(config: RunConfig) -> Iterator[Problem]:
    length, ranks = config.megatron_ds.model.seq_length, config.megatron_ds.parallel.tensor_model_parallel_size
    if length % ranks:
        rule = f"must be a multiple of tensor_model_parallel_size {ranks}, among which it is shared out"
        fix = f"set it to {nearest_multiples(length, ranks)}"
        yield problem(config, "model.seq_length", rule, fix, _TENSOR)


def experts_are_whole_or_on_all_tensor_ranks(config: RunConfig) -> Iterator[Problem]:
    ours = config.megatron_ds
    size, ranks = ours.parallel.expert_tensor_parallel_size, ours.parallel.tensor_model_parallel_size
    if size not in (1, ranks):
        rule = f"must be 1 or tensor_model_parallel_size {ranks}"
        yield problem(config, _EXPERT_TENSOR, rule, f"choose {either(sorted({1, ranks}))}", _TENSOR)
    elif size > 1 and ours.moe is None:
        yield problem(config, _EXPERT_TENSOR, "a dense model has no experts to share", "set it to 1", "moe")


def tensor_ranks_shard_optimizer_states_only(config: RunConfig) -> Iterator[Problem]:
    ranks, zero = config.megatron_ds.parallel.tensor_model_parallel_size, config.zero_optimization
    if ranks == 1:
        return
    if zero.stage >= 2:
        rule = f"gradients of tensor-parallel ranks ({ranks}) are completed before they are cut up, so it allows 0 or 1"
        yield problem(config, "zero_optimization.stage", rule, "set it to 1", _TENSOR, _PIPELINE)
    for name in zero.offloaded:
        rule = f"offloading is not tested with tensor parallelism ({ranks} ranks)"
        where = f"zero_optimization.{name}.device"
        yield problem(config, where, rule, 'set it to "none"', _TENSOR, _PIPELINE, "zero_optimization.stage")


# --- pipelines ------------------------------------------------------------------------------------------------------


def schedules_need_a_pipeline(config: RunConfig) -> Iterator[Problem]:
    parallel = config.megatron_ds.parallel
    kind, stages = parallel.schedule.kind, parallel.pipeline_model_parallel_size
    if kind != "1f1b" and stages == 1:
        rule, fix = "there is no pipeline with 1 rank", f'set it to "1f1b", or {_PIPELINE} to 2 or more'
        yield problem(config, _SCHEDULE, rule, fix, _PIPELINE)


def chunks_suit_the_schedule(config: RunConfig) -> Iterator[Problem]:
    parallel = config.megatron_ds.parallel
    kind, chunks = parallel.schedule.kind, parallel.num_chunks
    if kind == "interleaved" and chunks < 2:
        fix = 'set it to 2 or more, or parallel.schedule.kind to "1f1b"'
        yield problem(config, _CHUNKS, "the interleaved schedule goes around several chunks", fix, _SCHEDULE)
    elif kind == "zb_v" and chunks != 2:
        yield problem(config, _CHUNKS, "a V has two chunks on every rank", "set it to 2, or leave it out", _SCHEDULE)
    elif kind in ("1f1b", "zb_h1") and chunks > 1:
        fix = 'set parallel.schedule.kind to "interleaved", or leave it out'
        yield problem(config, _CHUNKS, f"the schedule {kind} has one chunk on every rank", fix, _SCHEDULE)


def every_stage_has_a_layer(config: RunConfig) -> Iterator[Problem]:
    layers, parallel = config.megatron_ds.model.num_layers, config.megatron_ds.parallel
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    if parallel.pipeline_model_parallel_layout is None and layers < ranks * chunks:
        each = f" in each of the {chunks} chunks" if chunks > 1 else ""
        rule = f"needs a decoder layer on every rank{each}, but model.num_layers is {layers}"
        legal = [count for count in range(1, layers // chunks + 1) if count > 1 or chunks == 1]
        fix = f"use at most {legal[-1]} ranks" if legal else "use 1f1b"
        fix += ", or give parallel.pipeline_model_parallel_layout" if layers >= ranks else ""
        yield problem(config, _PIPELINE, rule, fix, "model.num_layers", _CHUNKS, _SCHEDULE, _LAYOUT)


def the_layout_has_every_layer_once(config: RunConfig) -> Iterator[Problem]:
    layers, parallel = config.megatron_ds.model.num_layers, config.megatron_ds.parallel
    layout = parallel.pipeline_model_parallel_layout
    if layout is None:
        return
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    reads = ("model.num_layers", _PIPELINE, _CHUNKS, _SCHEDULE)
    rows = [layout[chunk * ranks : (chunk + 1) * ranks] for chunk in range(chunks)]
    if parallel.schedule.kind == "zb_v":
        rows[1:] = [row[::-1] for row in rows[1:]]
    if len(layout) != ranks * chunks:
        rule = f"needs one entry for each of {ranks} ranks x {chunks} chunks, and has {len(layout)}"
        yield problem(config, _LAYOUT, rule, f"list {ranks * chunks} numbers, or leave it out", *reads)
    elif sum(layout) != layers:
        fix = f"set model.num_layers to {sum(layout)}, or change the list"
        yield problem(config, _LAYOUT, f"must add up to model.num_layers {layers}, not {sum(layout)}", fix, *reads)
    elif empty := [rank for rank, counts in enumerate(zip(*rows, strict=True)) if not any(counts)]:
        yield problem(config, _LAYOUT, f"leaves rank {empty[0]} without a decoder layer", "give it one", *reads)


def pipelines_shard_optimizer_states_only(config: RunConfig) -> Iterator[Problem]:
    stages = config.megatron_ds.parallel.pipeline_model_parallel_size
    zero = config.zero_optimization
    if stages == 1:
        return
    if zero.stage >= 2:
        rule = f"a pipeline ({stages} stages) keeps whole gradients until its last micro-batch, so it allows 0 or 1"
        yield problem(config, "zero_optimization.stage", rule, "set it to 1", _PIPELINE)
    for name in zero.offloaded:
        rule = f"offloading does not work in a pipeline ({stages} stages) of DeepSpeed"
        yield problem(config, f"zero_optimization.{name}.device", rule, 'set it to "none"', _PIPELINE)


# --- the number of ranks --------------------------------------------------------------------------------------------


def axes_divide_the_world(config: RunConfig, world_size: int) -> Iterator[Problem]:
    if data_parallel_size(config, world_size) is not None:
        return
    parallel = config.megatron_ds.parallel
    used = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    rule = f"one copy of the model takes {used} ranks, which must divide the world of {world_size}"
    fix = f"launch {nearest_multiples(world_size, used)} ranks{nearest_topologies(config, world_size)}"
    yield problem(config, _PIPELINE, rule, fix, _TENSOR)


def nearest_topologies(config: RunConfig, world_size: int) -> str:
    """The topologies nearest to that of the configuration that so many ranks can have, as the end of a fix.

    Near means few doublings or halvings of an axis. Empty if there is none.
    """
    parallel = config.megatron_ds.parallel
    asked = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    sizes = [
        (tensor, pipeline, expert)
        for tensor in divisors(world_size)
        for pipeline in divisors(world_size // tensor)
        for expert in divisors(world_size // tensor // pipeline)
    ]
    sizes.sort(key=lambda size: (sum(abs(log2(new / old)) for new, old in zip(size, asked, strict=True)), size))
    found = list(islice((size for size in sizes if _is_legal(config, *size)), _SUGGESTIONS))
    words = [f"{tensor} x {pipeline} x {expert}" for tensor, pipeline, expert in found]
    return (
        f"; the nearest tensor x pipeline x expert sizes that fit {world_size} are {', '.join(words)}" if found else ""
    )


def _is_legal(config: RunConfig, tensor: int, pipeline: int, expert: int) -> bool:
    """Whether a configuration keeps the rules of this file with other sizes of its axes, and has so many experts."""
    ours = config.megatron_ds
    if (ours.moe.num_experts if ours.moe else 1) % expert:
        return False
    sizes = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": tensor if ours.parallel.expert_tensor_parallel_size > 1 else 1,
        "pipeline_model_parallel_layout": None,
    }
    changed = ours.model_copy(update={"parallel": ours.parallel.model_copy(update=sizes)})
    candidate = config.model_copy(update={"megatron_ds": changed})
    return not any(list(rule(candidate)) for rule in PARALLEL_RULES)


PARALLEL_RULES = (
    matrices_are_whole,
    tensor_ranks_divide_the_heads,
    tensor_ranks_divide_the_widths,
    tensor_ranks_divide_the_vocabulary,
    tensor_ranks_divide_the_sequence,
    experts_are_whole_or_on_all_tensor_ranks,
    tensor_ranks_shard_optimizer_states_only,
    schedules_need_a_pipeline,
    chunks_suit_the_schedule,
    every_stage_has_a_layer,
    the_layout_has_every_layer_once,
    pipelines_shard_optimizer_states_only,
)
PARALLEL_WORLD_RULES = (axes_divide_the_world,)
