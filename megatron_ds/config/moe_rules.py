"""Rules of experts, their router and their ranks, in the form that ``rules.py`` describes."""

from collections.abc import Iterator

from megatron_ds.config.moe_schema import MoEConfig, SigmoidRouter
from megatron_ds.config.parallel_rules import nearest_topologies
from megatron_ds.config.problems import Problem, divisors, either, problem
from megatron_ds.config.resolve import data_parallel_size, nearest_multiples
from megatron_ds.config.schema import RunConfig

_EXPERT_RANKS = "parallel.expert_model_parallel_size"
_GROUPS, _CHOSEN = "moe.router.num_groups", "moe.router.group_topk"


def _candidates(moe: MoEConfig) -> int:
    """Experts among which a token chooses after the coarse stage."""
    router = moe.router
    if router.num_groups is None or router.group_topk is None:
        return moe.num_experts
    return moe.num_experts // router.num_groups * router.group_topk


# --- generations ----------------------------------------------------------------------------------------------------


def experts_belong_to_v2(config: RunConfig) -> Iterator[Problem]:
    ours = config.megatron_ds
    if ours.generation == "v1" and ours.moe is not None:
        yield problem(config, "moe", "generation v1 is dense", 'set generation to "v2", or leave moe out', "generation")
    if ours.generation == "v2" and ours.moe is None:
        fix = 'leave moe out for its defaults, or set generation to "v1"'
        yield problem(config, "moe", "generation v2 has experts", fix, "generation")


def dense_models_have_no_expert_ranks(config: RunConfig) -> Iterator[Problem]:
    ours = config.megatron_ds
    if ours.moe is None and ours.parallel.expert_model_parallel_size > 1:
        rule = "a dense model has no experts to share among ranks"
        yield problem(config, _EXPERT_RANKS, rule, 'set it to 1, or generation to "v2"', "generation", "moe")


# --- layers and experts ---------------------------------------------------------------------------------------------


def the_layer_pattern_covers_the_model(config: RunConfig) -> Iterator[Problem]:
    moe, layers = config.megatron_ds.moe, config.megatron_ds.model.num_layers
    if moe is None or not isinstance(moe.moe_layer_freq, tuple):
        return
    where, reads = "moe.moe_layer_freq", "model.num_layers"
    if len(moe.moe_layer_freq) != layers:
        rule = f"needs one entry for each of the {layers} layers, and has {len(moe.moe_layer_freq)}"
        yield problem(config, where, rule, "list a 1 for every layer with experts, else 0", reads)
    elif not any(moe.moe_layer_freq):
        rule, fix = "leaves no layer with experts", 'put in a 1, or set generation to "v1"'
        yield problem(config, where, rule, fix, reads)


def a_token_has_enough_experts(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is not None and moe.moe_router_topk > moe.num_experts:
        rule = f"a token goes to different experts, of which there are {moe.num_experts}"
        yield problem(config, "moe.moe_router_topk", rule, f"set it to {moe.num_experts} or less", "moe.num_experts")


def one_weight_is_not_normalised(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is not None and moe.moe_router_topk == 1 and moe.router.norm_topk_prob:
        rule = "with moe_router_topk 1 the one weight divided by itself is 1, and the router cannot learn from the loss"
        yield problem(config, "moe.router.norm_topk_prob", rule, "set it to false", "moe.moe_router_topk")


def grouped_products_are_aligned(config: RunConfig) -> Iterator[Problem]:
    moe, model = config.megatron_ds.moe, config.megatron_ds.model
    if moe is None or moe.experts != "grouped_mm":
        return
    width, ranks = moe.moe_ffn_hidden_size or model.ffn_size, config.megatron_ds.parallel.expert_tensor_parallel_size
    widths = (("model.hidden_size", model.hidden_size, 8), ("moe.moe_ffn_hidden_size", width, 8 * ranks))
    for where, size, unit in widths:
        if size % unit:
            rule = f"grouped_mm reads 16 bytes at a time, so the width {size} must be a multiple of {unit}"
            fix = f'set it to {nearest_multiples(size, unit)}, or moe.experts to "loop"'
            reads = ("moe.experts", "model.ffn_hidden_size", "parallel.expert_tensor_parallel_size")
            yield problem(config, where, rule, fix, *reads)


# --- router ---------------------------------------------------------------------------------------------------------


def groups_say_how_many_stay(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is None:
        return
    if moe.router.num_groups is None and moe.router.group_topk is not None:
        fix = "set it to the number of groups, or group_topk to null"
        yield problem(config, _GROUPS, f"group_topk {moe.router.group_topk} chooses among groups", fix, _CHOSEN)
    if moe.router.num_groups is not None and moe.router.group_topk is None:
        rule = f"num_groups {moe.router.num_groups} needs the number of groups that stay candidates"
        yield problem(config, _CHOSEN, rule, f"choose 1 to {moe.router.num_groups}", _GROUPS)


def groups_divide_the_experts(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    groups = moe.router.num_groups if moe is not None else None
    if moe is None or groups is None:
        return
    reads = ("moe.num_experts", "moe.router.kind")
    options = divisors(moe.num_experts)
    if moe.num_experts % groups:
        rule = f"must divide num_experts {moe.num_experts}"
        yield problem(config, _GROUPS, rule, f"choose {either(options)}", *reads)
    elif isinstance(moe.router, SigmoidRouter) and moe.num_experts == groups:
        rule = "a group of a sigmoid router counts by its two best experts, so it needs at least 2"
        fix = f"choose {either(options[:-1])}" if options[:-1] else "set it and group_topk to null"
        yield problem(config, _GROUPS, rule, fix, *reads)


def chosen_groups_hold_enough_experts(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is None or moe.router.num_groups is None or moe.router.group_topk is None:
        return
    groups, chosen, experts = moe.router.num_groups, moe.router.group_topk, _candidates(moe)
    reads = (_GROUPS, "moe.num_experts", "moe.moe_router_topk")
    if chosen > groups:
        yield problem(config, _CHOSEN, f"must not exceed num_groups {groups}", f"choose 1 to {groups}", *reads)
    elif experts < moe.moe_router_topk:
        least = -(-moe.moe_router_topk * groups // moe.num_experts)
        rule = f"{chosen} of {groups} groups hold {experts} experts, and moe_router_topk is {moe.moe_router_topk}"
        yield problem(config, _CHOSEN, rule, f"set it to {least} or more", *reads)


def refined_candidates_fit_the_stages(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is None:
        return
    where, given, topk = "moe.router.refine_candidates", moe.router.refine_candidates, moe.moe_router_topk
    if moe.router.fine != "refine":
        if given is not None:
            fix = 'set moe.router.fine to "refine", or this to null'
            yield problem(config, where, "only a learned refine stage has candidates", fix, "moe.router.fine")
        return
    candidates, most = given or 2 * topk, _candidates(moe)
    if not topk <= candidates <= most:
        meant = "" if given else f"is by default {candidates}, and "
        rule = f"{meant}must lie between moe_router_topk {topk} and the {most} experts of the coarse stage"
        reads = ("moe.router.fine", "moe.moe_router_topk", "moe.num_experts", _GROUPS, _CHOSEN)
        yield problem(config, where, rule, f"choose {either(sorted({topk, most}))}", *reads)


def only_a_bias_is_updated(config: RunConfig) -> Iterator[Problem]:
    moe, where = config.megatron_ds.moe, "moe.moe_router_bias_update_rate"
    unused = (0.0, MoEConfig.model_fields["moe_router_bias_update_rate"].default)
    if moe is not None and moe.router.fine == "none" and moe.moe_router_bias_update_rate not in unused:
        fix = 'leave it out, or set moe.router.fine to "bias"'
        yield problem(config, where, "has no effect on a router without a bias", fix, "moe.router.fine")


# --- ranks ----------------------------------------------------------------------------------------------------------


def ranks_divide_the_experts(config: RunConfig) -> Iterator[Problem]:
    moe, ranks = config.megatron_ds.moe, config.megatron_ds.parallel.expert_model_parallel_size
    if moe is not None and moe.num_experts % ranks:
        rule = f"must divide num_experts {moe.num_experts}"
        yield problem(config, _EXPERT_RANKS, rule, f"choose {either(divisors(moe.num_experts))}", "moe.num_experts")


def experts_elsewhere_need_an_exchange(config: RunConfig) -> Iterator[Problem]:
    moe, ranks = config.megatron_ds.moe, config.megatron_ds.parallel.expert_model_parallel_size
    if moe is not None and moe.dispatcher == "local" and ranks > 1:
        rule = f"reaches no other rank, and {ranks} ranks share the experts"
        fix = f'set it to "ring", or {_EXPERT_RANKS} to 1'
        yield problem(config, "moe.dispatcher", rule, fix, _EXPERT_RANKS)


def nodes_divide_the_expert_ranks(config: RunConfig) -> Iterator[Problem]:
    moe, parallel = config.megatron_ds.moe, config.megatron_ds.parallel
    ranks, per_node = parallel.expert_model_parallel_size, parallel.expert_ranks_per_node
    if moe is not None and moe.dispatcher == "hierarchical" and per_node is not None and ranks % per_node:
        rule = f"must divide expert_model_parallel_size {ranks}"
        fix = f"choose {either(divisors(ranks))}"
        yield problem(config, "parallel.expert_ranks_per_node", rule, fix, _EXPERT_RANKS, "moe.dispatcher")


def a_narrow_wire_is_narrower(config: RunConfig) -> Iterator[Problem]:
    moe = config.megatron_ds.moe
    if moe is not None and moe.wire_dtype == "bf16" and config.dtype_name == "fp16":
        rule = "is not narrower than fp16, and rounds it"
        yield problem(config, "moe.wire_dtype", rule, 'set it to "same"', "fp16.enabled")


def experts_keep_whole_parameters(config: RunConfig) -> Iterator[Problem]:
    if config.megatron_ds.moe is not None and config.zero_optimization.stage == 3:
        rule = "stage 3 cuts parameters up between uses, and the passes of experts need them whole"
        yield problem(config, "zero_optimization.stage", rule, "set it to 1 or 2", "moe", "generation")


def experts_elsewhere_are_not_offloaded(config: RunConfig) -> Iterator[Problem]:
    ranks, zero = config.megatron_ds.parallel.expert_model_parallel_size, config.zero_optimization
    if config.megatron_ds.moe is None or ranks == 1:
        return
    for name in zero.offloaded:
        rule = f"offloading is not tested with expert parallelism ({ranks} ranks)"
        fix = f'set it to "none", or {_EXPERT_RANKS} to 1'
        reads = (_EXPERT_RANKS, "zero_optimization.stage", "parallel.pipeline_model_parallel_size")
        yield problem(config, f"zero_optimization.{name}.device", rule, fix, *reads)


def expert_ranks_divide_the_data_axis(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel = config.megatron_ds.parallel
    experts, ranks = parallel.expert_model_parallel_size, data_parallel_size(config, world_size)
    if config.megatron_ds.moe is None or ranks is None or ranks % experts == 0:
        return
    one_copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * experts
    rule = f"must divide the {ranks} data-parallel ranks, over which a layer's experts are spread"
    fix = f"choose {either(divisors(ranks))}, or launch {nearest_multiples(world_size, one_copy)} ranks"
    fix += nearest_topologies(config, world_size)
    reads = ("parallel.pipeline_model_parallel_size", "parallel.tensor_model_parallel_size", "moe.num_experts")
    yield problem(config, _EXPERT_RANKS, rule, fix, *reads)


MOE_RULES = (
    experts_belong_to_v2,
    dense_models_have_no_expert_ranks,
    the_layer_pattern_covers_the_model,
    a_token_has_enough_experts,
    one_weight_is_not_normalised,
    grouped_products_are_aligned,
    groups_say_how_many_stay,
    groups_divide_the_experts,
    chosen_groups_hold_enough_experts,
    refined_candidates_fit_the_stages,
    only_a_bias_is_updated,
    ranks_divide_the_experts,
    experts_elsewhere_need_an_exchange,
    nodes_divide_the_expert_ranks,
    a_narrow_wire_is_narrower,
    experts_keep_whole_parameters,
    experts_elsewhere_are_not_offloaded,
)
MOE_WORLD_RULES = (expert_ranks_divide_the_data_axis,)
