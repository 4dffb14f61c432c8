"""Rules that span several settings: the model's sizes, ZeRO and precision.

A rule is a small generator: it looks at a configuration and yields the problems it sees, each with the values it read.
Rules know nothing of one another; a rule whose inputs are already reported as wrong is silenced by ``Findings``. Ranges
of single values are in the schema; ``parallel_rules.py`` has the rules of the parallel axes, ``moe_rules.py`` those of
experts, ``training_rules.py`` and ``schedule_rules.py`` those of batch, data and what changes during a run.
"""

from collections.abc import Callable, Iterator

from megatron_ds.config.model_schema import HybridAttention, LatentAttention, Llama3Rope, YarnRope
from megatron_ds.config.moe_rules import MOE_RULES, MOE_WORLD_RULES
from megatron_ds.config.parallel_rules import PARALLEL_RULES, PARALLEL_WORLD_RULES
from megatron_ds.config.problems import Findings, Problem, divisors, either, problem
from megatron_ds.config.resolve import data_parallel_size, nearest_multiples
from megatron_ds.config.schedule_rules import SCHEDULE_RULES, SCHEDULE_WORLD_RULES
from megatron_ds.config.schema import RunConfig, TrainingConfig
from megatron_ds.config.training_rules import TRAINING_RULES, TRAINING_WORLD_RULES

Rule = Callable[[RunConfig], Iterator[Problem]]
WorldRule = Callable[[RunConfig, int], Iterator[Problem]]


# --- model ----------------------------------------------------------------------------------------------------------


def heads_divide_the_width(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    heads = model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads and not isinstance(model.attention, LatentAttention):
        # Twice the heads, since the width of a head must also be even.
        fix = f"set it to {nearest_multiples(model.hidden_size, 2 * heads)}, or give model.kv_channels"
        rule = f"must be a multiple of num_attention_heads {heads} when kv_channels is not given"
        yield problem(config, "model.hidden_size", rule, fix, "model.num_attention_heads", "model.kv_channels")


def groups_divide_the_heads(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    heads = model.num_attention_heads
    if heads % model.num_kv_heads:
        rule = f"must divide num_attention_heads {heads}"
        fix = f"choose {either(divisors(heads))}"
        yield problem(config, "model.num_query_groups", rule, fix, "model.num_attention_heads")


def rotary_needs_an_even_head(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    if model.rotary_dim % 2 == 0:
        return
    rule = f"the head width {model.rotary_dim} must be even, since rotary embedding turns pairs of channels"
    if isinstance(model.attention, LatentAttention):
        where = "model.attention.qk_pos_emb_head_dim"
        yield problem(config, where, rule, f"set it to {model.rotary_dim + 1}", "model.attention.kind")
    elif model.kv_channels is not None:
        fix = f"set it to {model.kv_channels + 1}"
        yield problem(config, "model.kv_channels", rule, fix)
    else:
        fix = f"give model.kv_channels {model.head_dim + 1}, or another number of heads"
        yield problem(config, "model.hidden_size", rule, fix, "model.num_attention_heads", "model.kv_channels")


def samples_fit_the_positions(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    if model.seq_length > model.max_positions:
        rule = f"must hold a sample of seq_length {model.seq_length}"
        fix = f"set it to {model.seq_length} or more"
        yield problem(config, "model.max_position_embeddings", rule, fix, "model.seq_length")


def extension_starts_below_its_end(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    scaling = model.rope_scaling
    if not isinstance(scaling, Llama3Rope | YarnRope):
        return
    where = "model.rope_scaling.original_max_position_embeddings"
    if scaling.original_max_position_embeddings > model.max_positions:
        rule = f"must not exceed the extended context of {model.max_positions} positions"
        fix = f"set it to {model.max_positions} or less, or raise model.max_position_embeddings"
        yield problem(config, where, rule, fix, "model.max_position_embeddings", "model.seq_length")


def frequencies_are_ordered(config: RunConfig) -> Iterator[Problem]:
    scaling = config.megatron_ds.model.rope_scaling
    section = "model.rope_scaling"
    if isinstance(scaling, YarnRope) and scaling.beta_fast <= scaling.beta_slow:
        rule, fix = f"must be above beta_slow {scaling.beta_slow:g}", "the defaults are 32 and 1"
        yield problem(config, f"{section}.beta_fast", rule, fix, f"{section}.beta_slow")
    if isinstance(scaling, Llama3Rope) and scaling.high_freq_factor <= scaling.low_freq_factor:
        rule, fix = f"must be above low_freq_factor {scaling.low_freq_factor:g}", "the defaults are 4 and 1"
        yield problem(config, f"{section}.high_freq_factor", rule, fix, f"{section}.low_freq_factor")


def windows_grow(config: RunConfig) -> Iterator[Problem]:
    attention = config.megatron_ds.model.attention
    if not isinstance(attention, HybridAttention) or attention.window_growth is None:
        return
    if attention.window_growth.start > attention.window:
        rule = f"must not exceed the final window {attention.window}"
        fix = f"set it to {attention.window} or less"
        yield problem(config, "model.attention.window_growth.start", rule, fix, "model.attention.window")


def latent_attention_makes_all_heads(config: RunConfig) -> Iterator[Problem]:
    model, kind = config.megatron_ds.model, "model.attention.kind"
    if not isinstance(model.attention, LatentAttention):
        return
    if model.num_kv_heads != model.num_attention_heads:
        rule = "latent attention has as many key and value heads as query heads"
        yield problem(config, "model.num_query_groups", rule, "leave it out", "model.num_attention_heads", kind)
    if model.kv_channels is not None:
        rule = "the heads of latent attention have widths of their own"
        fix = "leave it out, and set model.attention.qk_head_dim and model.attention.v_head_dim"
        yield problem(config, "model.kv_channels", rule, fix, kind)
    if model.add_qkv_bias:
        rule = "the projections of latent attention have no bias"
        yield problem(config, "model.add_qkv_bias", rule, "set it to false", kind)
    if model.qk_layernorm:
        rule = "latent attention normalises the compressed queries, keys and values instead"
        yield problem(config, "model.qk_layernorm", rule, "set it to false", kind)


def further_tokens_are_within_the_sample(config: RunConfig) -> Iterator[Problem]:
    model = config.megatron_ds.model
    if model.mtp_num_layers >= model.seq_length:
        rule = f"no target is so far ahead in a sample of {model.seq_length} tokens"
        fix = f"set it to {model.seq_length - 1} or less"
        yield problem(config, "model.mtp_num_layers", rule, fix, "model.seq_length")


def only_mtp_blocks_have_a_loss(config: RunConfig) -> Iterator[Problem]:
    training, where = config.megatron_ds.training, "training.mtp_loss_scaling_factor"
    default = TrainingConfig.model_fields["mtp_loss_scaling_factor"].default
    if config.megatron_ds.model.mtp_num_layers == 0 and training.mtp_loss_scaling_factor != default:
        fix = "leave it out, or set model.mtp_num_layers to 1"
        yield problem(config, where, "has no effect on a model without MTP blocks", fix, "model.mtp_num_layers")


# --- ZeRO ------------------------------------------------------------------------------------------------------------


def offloaded_states_are_sharded(config: RunConfig) -> Iterator[Problem]:
    zero = config.zero_optimization
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if name in zero.offloaded and zero.stage < least:
            rule = f"needs ZeRO stage {least} or more, and zero_optimization.stage is {zero.stage}"
            fix = f'set the stage to {least}, or this to "none"'
            yield problem(config, f"zero_optimization.{name}.device", rule, fix, "zero_optimization.stage")


def scatter_divides_once(config: RunConfig) -> Iterator[Problem]:
    zero = config.zero_optimization
    if zero.stage < 2 or (zero.model_extra or {}).get("reduce_scatter") is False:
        return
    rule = f"cannot be combined with the reduce-scatter of ZeRO stage {zero.stage}"
    reads = ("zero_optimization.stage", "zero_optimization.reduce_scatter")
    if config.prescale_gradients:
        yield problem(config, "prescale_gradients", rule, "set it to false", *reads)
    if config.gradient_predivide_factor != 1.0:
        yield problem(config, "gradient_predivide_factor", rule, "set it to 1.0", *reads)


# --- precision ------------------------------------------------------------------------------------------------------


def there_is_one_precision(config: RunConfig) -> Iterator[Problem]:
    if config.bf16.enabled and config.fp16.enabled:
        rule = "bf16 is enabled too, and a run has one precision"
        yield problem(config, "fp16.enabled", rule, "set one of bf16.enabled and fp16.enabled to false", "bf16.enabled")


def half_precision_has_master_weights(config: RunConfig) -> Iterator[Problem]:
    name = config.dtype_name
    if name != "fp32" and config.zero_optimization.stage == 0:
        rule = f"{name} needs the fp32 master weights that ZeRO keeps from stage 1 on"
        yield problem(config, "zero_optimization.stage", rule, "set it to 1", f"{name}.enabled", "fp16.enabled")


def gradients_travel_in_a_type_that_holds_them(config: RunConfig) -> Iterator[Problem]:
    allowed = {"fp32", config.dtype_name}
    if config.communication_data_type not in (None, *allowed):
        rule = f"must be {' or '.join(sorted(allowed))}, the types that hold the gradients of this run"
        fix = "set it to fp32 or leave it out"
        yield problem(config, "communication_data_type", rule, fix, "bf16.enabled", "fp16.enabled")


# --- the number of ranks --------------------------------------------------------------------------------------------


def secondary_shards_divide_the_data_axis(config: RunConfig, world_size: int) -> Iterator[Problem]:
    zero = config.zero_optimization
    size = (zero.model_extra or {}).get("zero_hpz_partition_size", 1)
    ranks = data_parallel_size(config, world_size)
    where = "zero_optimization.zero_hpz_partition_size"
    if size > 1 and zero.stage != 3:
        fix = "set the stage to 3, or this to 1"
        yield problem(config, where, "needs ZeRO stage 3", fix, "zero_optimization.stage")
    elif size > 1 and ranks is not None and ranks % size:
        rule = f"must divide the {ranks} data-parallel ranks"
        reads = ("parallel.pipeline_model_parallel_size", "parallel.tensor_model_parallel_size")
        yield problem(config, where, rule, f"choose {either(divisors(ranks))}", *reads)


RULES: tuple[Rule, ...] = (
    heads_divide_the_width,
    groups_divide_the_heads,
    rotary_needs_an_even_head,
    samples_fit_the_positions,
    extension_starts_below_its_end,
    frequencies_are_ordered,
    windows_grow,
    latent_attention_makes_all_heads,
    further_tokens_are_within_the_sample,
    only_mtp_blocks_have_a_loss,
    offloaded_states_are_sharded,
    scatter_divides_once,
    there_is_one_precision,
    half_precision_has_master_weights,
    gradients_travel_in_a_type_that_holds_them,
    *PARALLEL_RULES,
    *MOE_RULES,
    *TRAINING_RULES,
    *SCHEDULE_RULES,
)
WORLD_RULES: tuple[WorldRule, ...] = (
    *PARALLEL_WORLD_RULES,
    secondary_shards_divide_the_data_axis,
    *MOE_WORLD_RULES,
    *TRAINING_WORLD_RULES,
    *SCHEDULE_WORLD_RULES,
)


def find_broken(config: RunConfig, world_size: int, findings: Findings) -> None:
    """Run all rules; what they find is added to ``findings``, except where it follows from what is there already."""
    for rule in RULES:
        for found in rule(config):
            findings.add(found)
    for rule in WORLD_RULES:
        for found in rule(config, world_size):
            findings.add(found)
