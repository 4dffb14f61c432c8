"""Every rule with an example that breaks it and one that just does not."""

import json

import pytest
from parallel_cases import PARALLEL_CASES
from schedule_cases import SCHEDULE_CASES

from megatron_ds.config.check import check
from megatron_ds.config.problems import Findings
from megatron_ds.config.rules import RULES, WORLD_RULES, find_broken
from megatron_ds.config.tree import full_path, write

DATA = {"data.data_path": ["data/corpus"], "data.tokenizer": "data/tokenizer"}
YARN = {"model.rope_scaling": {"kind": "yarn", "factor": 4, "original_max_position_embeddings": 512}}
LLAMA = {"model.rope_scaling": {"kind": "llama3", "original_max_position_embeddings": 1024}}
LATENT = {"model.attention": {"kind": "latent"}, "model.qk_layernorm": False}
OFFLOAD = {"zero_optimization.offload_optimizer.device": "cpu"}
EVAL = "data.eval_data_path"


def build(settings: dict, findings: Findings):
    """The configuration with the given settings, short paths as in --set."""
    tree: dict = {}
    for path, value in {**DATA, **settings}.items():
        write(tree, full_path(tuple(path.split("."))), json.loads(json.dumps(value)))
    return check(tree, findings)


def broken(settings: dict, world_size: int = 1) -> list[tuple[str, str, str]]:
    """(path, rule, fix) of all problems."""
    findings = Findings()
    config = build(settings, findings)
    assert not findings.problems, findings.problems
    find_broken(config, world_size, findings)
    return [(".".join(p.path).removeprefix("megatron_ds."), p.rule, p.fix) for p in findings.problems]


# rule: (breaks it, place, part of the fix, does not break it, number of ranks)
CASES = {
    "heads_divide_the_width": [
        ({"model.hidden_size": 770}, "model.hidden_size", "768 or 792", {**LATENT, "model.hidden_size": 770}, 1),
        ({"model.hidden_size": 770}, "model.hidden_size", "768 or 792", {"model.hidden_size": 792}, 1),
        (
            {"model.hidden_size": 6},
            "model.hidden_size",
            "set it to 24",
            {"model.hidden_size": 6, "model.kv_channels": 4},
            1,
        ),
    ],
    "groups_divide_the_heads": [
        (
            {"model.num_query_groups": 5},
            "model.num_query_groups",
            "1, 2, 3, 4, 6 or 12",
            {"model.num_query_groups": 4},
            1,
        ),
        ({"model.num_query_groups": 24}, "model.num_query_groups", "or 12", {"model.num_query_groups": 12}, 1),
    ],
    "rotary_needs_an_even_head": [
        (
            {**LATENT, "model.attention.qk_pos_emb_head_dim": 7},
            "model.attention.qk_pos_emb_head_dim",
            "8",
            {**LATENT, "model.attention.qk_head_dim": 7},
            1,
        ),
        ({"model.kv_channels": 33}, "model.kv_channels", "34", {"model.kv_channels": 34}, 1),
        (
            {"model.hidden_size": 84},
            "model.hidden_size",
            "kv_channels 8",
            {"model.hidden_size": 84, "model.kv_channels": 8},
            1,
        ),
    ],
    "latent_attention_makes_all_heads": [
        ({**LATENT, "model.num_query_groups": 4}, "model.num_query_groups", "leave it out", LATENT, 1),
        ({**LATENT, "model.qk_layernorm": True}, "model.qk_layernorm", "false", {"model.qk_layernorm": True}, 1),
        ({**LATENT, "model.kv_channels": 64}, "model.kv_channels", "v_head_dim", {"model.kv_channels": 64}, 1),
        ({**LATENT, "model.add_qkv_bias": True}, "model.add_qkv_bias", "false", {"model.add_qkv_bias": True}, 1),
    ],
    "further_tokens_are_within_the_sample": [
        (
            {"model.mtp_num_layers": 8, "model.seq_length": 8},
            "model.mtp_num_layers",
            "7 or less",
            {"model.mtp_num_layers": 7, "model.seq_length": 8},
            1,
        ),
    ],
    "only_mtp_blocks_have_a_loss": [
        (
            {"training.mtp_loss_scaling_factor": 0.3},
            "training.mtp_loss_scaling_factor",
            "mtp_num_layers to 1",
            {"training.mtp_loss_scaling_factor": 0.3, "model.mtp_num_layers": 1},
            1,
        ),
    ],
    "local_checkpoints_have_place_and_interval": [
        (
            {"checkpoint.local_save": "/local"},
            "checkpoint.local_save",
            "--local-save-interval",
            {"checkpoint.local_save": "/local", "checkpoint.local_save_interval": 10},
            1,
        ),
        ({"checkpoint.local_save_interval": 10}, "checkpoint.local_save_interval", "--local-save DIR", {}, 1),
        ({"checkpoint.local_save_neighbour": True}, "checkpoint.local_save_neighbour", "--local-save DIR", {}, 1),
    ],
    "retention_has_a_number": [
        (
            {"checkpoint.save_retain_interval": 10},
            "checkpoint.save_retain_interval",
            "--keep-last",
            {"checkpoint.save_retain_interval": 10, "checkpoint.keep_last": 1},
            1,
        ),
        (
            {"checkpoint.keep_best": True},
            "checkpoint.keep_best",
            "--keep-last",
            {"checkpoint.keep_best": True, "checkpoint.keep_last": 3},
            1,
        ),
    ],
    "the_best_is_measured": [
        (
            {"checkpoint.save_hf": "best", "training.eval_interval": None},
            "checkpoint.save_hf",
            "--eval-interval",
            {"checkpoint.save_hf": "last", "training.eval_interval": None},
            1,
        ),
        (
            {"checkpoint.keep_best": True, "checkpoint.keep_last": 1, "training.eval_interval": None},
            "checkpoint.keep_best",
            "--eval-interval",
            {"checkpoint.keep_best": True, "checkpoint.keep_last": 1},
            1,
        ),
    ],
    "finetuning_begins_with_weights": [
        (
            {"checkpoint.finetune": True},
            "checkpoint.finetune",
            "--load",
            {"checkpoint.finetune": True, "checkpoint.load": "a"},
            1,
        ),
    ],
    "samples_fit_the_positions": [
        (
            {"model.max_position_embeddings": 2047},
            "model.max_position_embeddings",
            "2048 or more",
            {"model.max_position_embeddings": 2048},
            1,
        )
    ],
    "extension_starts_below_its_end": [
        (
            {**YARN, "model.seq_length": 511},
            "model.rope_scaling.original_max_position_embeddings",
            "511 or less",
            {**YARN, "model.seq_length": 512},
            1,
        ),
        (
            {**LLAMA, "model.seq_length": 512},
            "model.rope_scaling.original_max_position_embeddings",
            "raise model.max_position_embeddings",
            {**LLAMA, "model.seq_length": 512, "model.max_position_embeddings": 1024},
            1,
        ),
    ],
    "frequencies_are_ordered": [
        (
            {"model.rope_scaling": {**YARN["model.rope_scaling"], "beta_fast": 1}},
            "model.rope_scaling.beta_fast",
            "32 and 1",
            {"model.rope_scaling": {**YARN["model.rope_scaling"], "beta_fast": 2}},
            1,
        ),
        (
            {"model.rope_scaling": {**LLAMA["model.rope_scaling"], "high_freq_factor": 1}},
            "model.rope_scaling.high_freq_factor",
            "4 and 1",
            LLAMA,
            1,
        ),
    ],
    "windows_grow": [
        (
            {"model.attention.window_growth": {"start": 257, "iters": 10}},
            "model.attention.window_growth.start",
            "256 or less",
            {"model.attention.window_growth": {"start": 256, "iters": 10}},
            1,
        )
    ],
    "offloaded_states_are_sharded": [
        (
            {"zero_optimization.stage": 0, **OFFLOAD},
            "zero_optimization.offload_optimizer.device",
            "stage to 1",
            {"zero_optimization.stage": 2, **OFFLOAD},
            1,
        ),
        (
            {"zero_optimization.stage": 2, "zero_optimization.offload_param.device": "cpu"},
            "zero_optimization.offload_param.device",
            "stage to 3",
            {"zero_optimization.stage": 3, "zero_optimization.offload_param.device": "cpu"},
            1,
        ),
    ],
    "scatter_divides_once": [
        (
            {"prescale_gradients": True, "zero_optimization.stage": 2},
            "prescale_gradients",
            "false",
            {"prescale_gradients": True, "zero_optimization.stage": 1},
            1,
        ),
        (
            {"gradient_predivide_factor": 2.0, "zero_optimization.stage": 3},
            "gradient_predivide_factor",
            "1.0",
            {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 3, "reduce_scatter": False}},
            1,
        ),
    ],
    "there_is_one_precision": [
        ({"bf16.enabled": True, "fp16.enabled": True}, "fp16.enabled", "to false", {"bf16.enabled": True}, 1)
    ],
    "half_precision_has_master_weights": [
        (
            {"bf16.enabled": True, "zero_optimization.stage": 0},
            "zero_optimization.stage",
            "set it to 1",
            {"zero_optimization.stage": 0},
            1,
        ),
        (
            {"fp16.enabled": True, "zero_optimization.stage": 0},
            "zero_optimization.stage",
            "set it to 1",
            {"fp16.enabled": True},
            1,
        ),
    ],
    "gradients_travel_in_a_type_that_holds_them": [
        (
            {"bf16.enabled": True, "communication_data_type": "fp16"},
            "communication_data_type",
            "fp32",
            {"bf16.enabled": True, "communication_data_type": "bf16"},
            1,
        ),
        (
            {"communication_data_type": "bf16"},
            "communication_data_type",
            "fp32",
            {"communication_data_type": "fp32"},
            1,
        ),
    ],
    "secondary_shards_divide_the_data_axis": [
        (
            {"zero_optimization.zero_hpz_partition_size": 2},
            "zero_optimization.zero_hpz_partition_size",
            "stage to 3",
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            4,
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            "zero_optimization.zero_hpz_partition_size",
            "1, 2 or 4",
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}},
            4,
        ),
    ],
    "batch_sizes_fit": [
        (
            {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            "train_batch_size",
            "set it to 8",
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            2,
        ),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2},
            "train_batch_size",
            "set it to 8 or 12",
            {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2},
            2,
        ),
        (
            {"train_batch_size": 3, "gradient_accumulation_steps": 2},
            "train_batch_size",
            "set it to 4",
            {"train_batch_size": 4, "gradient_accumulation_steps": 2},
            2,
        ),
        ({"train_batch_size": 3}, "train_batch_size", "set it to 2 or 4", {"train_batch_size": 4}, 2),
    ],
    "learning_rates_fall": [
        (
            {"training.min_lr": 0.1, "optimizer.params.lr": 0.01},
            "training.min_lr",
            "0.01 or less",
            {"training.min_lr": 0.01, "optimizer.params.lr": 0.01},
            1,
        ),
        (
            {"training.lr_warmup_init": 1e-3, "train_batch_size": 256},
            "training.lr_warmup_init",
            "0.0005 or less",
            {"training.lr_warmup_init": 1e-3, "train_batch_size": 512},
            1,
        ),
    ],
    "warmup_is_given_once": [
        (
            {"training.lr_warmup_iters": 0, "training.lr_warmup_fraction": 0.1},
            "training.lr_warmup_fraction",
            "null",
            {"training.lr_warmup_fraction": 0.1},
            1,
        )
    ],
    "phases_fit_the_schedule": [
        ({"training.lr_warmup_iters": 1000}, "training.lr_warmup_iters", "999", {"training.lr_warmup_iters": 999}, 1),
        (
            {"training.lr_warmup_fraction": 1.0},
            "training.lr_warmup_fraction",
            "0.99 or less",
            {"training.lr_warmup_fraction": 1.0, "training.lr_decay_style": "constant"},
            1,
        ),
        (
            {"training.lr_decay_style": "WSD", "training.lr_wsd_decay_iters": 901, "training.lr_warmup_iters": 100},
            "training.lr_wsd_decay_iters",
            "900 or less",
            {"training.lr_decay_style": "WSD", "training.lr_wsd_decay_iters": 900, "training.lr_warmup_iters": 100},
            1,
        ),
        (
            {"training.lr_decay_style": "WSD", "training.lr_warmup_iters": 901},
            "training.lr_warmup_iters",
            "900 or less",
            {"training.lr_decay_style": "linear", "training.lr_warmup_iters": 901},
            1,
        ),
    ],
    "vocabulary_is_known": [
        (
            {"data.tokenizer": None, "model.vocab_size": 100},
            "data.tokenizer",
            "both",
            {"data.tokenizer": None, "model.vocab_size": 100, "data.eod_id": 0},
            1,
        ),
        (
            {"model.vocab_size": 100, "data.eod_id": 100},
            "data.eod_id",
            "0 to 99",
            {"model.vocab_size": 100, "data.eod_id": 99},
            1,
        ),
    ],
    "there_is_data": [
        (
            {"data.data_path": [], EVAL: {"a": ["x"]}},
            "data.data_path",
            "prepare-data",
            {"data.data_path": [], EVAL: {"a": ["x"]}, "training.skip_train": True},
            1,
        )
    ],
    "blends_are_weights_and_prefixes": [
        ({"data.data_path": path}, "data.data_path", "0.3 a 0.7 b", {"data.data_path": good}, 1)
        for path, good in (
            (["0.3", "a", "0.7"], ["0.3", "a", "0.7", "b"]),
            (["0.3", "a", "b", "c"], ["a", "b", "c"]),
            (["0", "a"], ["1", "a"]),
            (["0.5", "a", "inf", "b"], ["0.5", "a", "5", "b"]),
            ([""], ["a"]),
            (["a", "0.5"], ["a", "./0.5"]),
        )
    ]
    + [({EVAL: {"a": []}}, f"{EVAL}.a", "0.3 a 0.7 b", {EVAL: {"a": ["0.5", "x", "1", "y"]}}, 1)],
    "evaluation_sets_have_plain_names": [
        ({EVAL: {"a b": ["x"]}}, f"{EVAL}.a b", "rename", {EVAL: {"a-b_1": ["x"]}}, 1)
    ],
    "split_leaves_training_data": [
        ({"data.split": "0,1,0"}, "data.split", "first share", {"data.split": "0,1,0", "training.skip_train": True}, 1),
        ({"data.split": "0,0,0"}, "data.split", "969,30,1", {"data.split": "1"}, 1),
        ({"data.split": "1.2.3"}, "data.split", "969,30,1", {"data.split": "98, 2"}, 1),
    ],
}
EP, GROUPS, CHOSEN = "parallel.expert_model_parallel_size", "moe.router.num_groups", "moe.router.group_topk"
V2 = {"generation": "v2", "moe": {}}


def moe(**settings) -> dict:
    """Settings of a v2 model with 8 experts, top-2; double underscores are dots."""
    return V2 | {f"moe.{name.replace('__', '.')}": value for name, value in settings.items()}


TP_EXPERTS = {"parallel.tensor_model_parallel_size": 2, "parallel.expert_tensor_parallel_size": 2}

MOE_CASES = {
    "experts_belong_to_v2": [
        ({"moe": {}}, "moe", 'generation to "v2"', V2, 1),
        ({"moe": {"num_experts": 4}, EP: 2}, "moe", 'generation to "v2"', {}, 2),
        ({"generation": "v2"}, "moe", 'generation to "v1"', V2, 1),
        ({"generation": "v2", EP: 2}, "moe", "leave moe out", {**V2, EP: 2}, 2),
    ],
    "dense_models_have_no_expert_ranks": [({EP: 2}, EP, 'generation to "v2"', {EP: 1}, 2)],
    "the_layer_pattern_covers_the_model": [
        (
            {**moe(moe_layer_freq=[0, 1, 1]), "model.num_layers": 4},
            "moe.moe_layer_freq",
            "every layer",
            {**moe(moe_layer_freq=[0, 1, 1, 0]), "model.num_layers": 4},
            1,
        ),
        (
            {**moe(moe_layer_freq=[0, 0]), "model.num_layers": 2},
            "moe.moe_layer_freq",
            'generation to "v1"',
            {**moe(moe_layer_freq=[0, 1]), "model.num_layers": 2},
            1,
        ),
    ],
    "a_token_has_enough_experts": [
        (moe(moe_router_topk=9), "moe.moe_router_topk", "8 or less", moe(moe_router_topk=8), 1),
    ],
    "one_weight_is_not_normalised": [
        (
            moe(moe_router_topk=1, router={"kind": kind}),
            "moe.router.norm_topk_prob",
            "false",
            moe(moe_router_topk=1, router={"kind": kind, "norm_topk_prob": False}),
            1,
        )
        for kind in ("softmax", "sigmoid")
    ],
    "grouped_products_are_aligned": [
        (moe(moe_ffn_hidden_size=30), "moe.moe_ffn_hidden_size", "24 or 32", moe(moe_ffn_hidden_size=32), 1),
        (
            moe(moe_ffn_hidden_size=28),
            "moe.moe_ffn_hidden_size",
            '"loop"',
            moe(moe_ffn_hidden_size=28, experts="loop"),
            1,
        ),
        (
            {**V2, "model.hidden_size": 36, "model.num_attention_heads": 3},
            "model.hidden_size",
            "32 or 40",
            {**V2, "model.hidden_size": 48, "model.num_attention_heads": 3},
            1,
        ),
        (
            {"generation": "v3", **TP_EXPERTS, "moe.moe_ffn_hidden_size": 40},
            "moe.moe_ffn_hidden_size",
            "32 or 48",
            {"generation": "v3", **TP_EXPERTS, "moe.moe_ffn_hidden_size": 48},
            2,
        ),
        ({**V2, "model.ffn_hidden_size": 90}, "moe.moe_ffn_hidden_size", "88 or 96", {"model.ffn_hidden_size": 90}, 1),
    ],
    "groups_say_how_many_stay": [
        (moe(router__num_groups=4), CHOSEN, "1 to 4", moe(router__num_groups=4, router__group_topk=2), 1),
        (moe(router__group_topk=2), GROUPS, "null", moe(router__num_groups=2, router__group_topk=2), 1),
    ],
    "groups_divide_the_experts": [
        (
            moe(router__num_groups=3, router__group_topk=2),
            GROUPS,
            "1, 2, 4 or 8",
            moe(router__num_groups=8, router__group_topk=2),
            1,
        ),
        (
            moe(router={"kind": "sigmoid", "num_groups": 8, "group_topk": 2}),
            GROUPS,
            "1, 2 or 4",
            moe(router={"kind": "sigmoid", "num_groups": 4, "group_topk": 2}),
            1,
        ),
        (
            moe(
                num_experts=1,
                moe_router_topk=1,
                router={"kind": "sigmoid", "num_groups": 1, "group_topk": 1, "norm_topk_prob": False},
            ),
            GROUPS,
            "to null",
            moe(num_experts=1, moe_router_topk=1, router={"kind": "sigmoid", "norm_topk_prob": False}),
            1,
        ),
    ],
    "chosen_groups_hold_enough_experts": [
        (
            moe(router__num_groups=4, router__group_topk=5),
            CHOSEN,
            "1 to 4",
            moe(router__num_groups=4, router__group_topk=4),
            1,
        ),
        (
            moe(router__num_groups=4, router__group_topk=1, moe_router_topk=3),
            CHOSEN,
            "2 or more",
            moe(router__num_groups=4, router__group_topk=2, moe_router_topk=3),
            1,
        ),
    ],
    "refined_candidates_fit_the_stages": [
        (
            moe(router__refine_candidates=4),
            "moe.router.refine_candidates",
            '"refine"',
            moe(router__refine_candidates=4, router__fine="refine"),
            1,
        ),
        (
            moe(router__fine="refine", router__refine_candidates=1),
            "moe.router.refine_candidates",
            "2 or 8",
            moe(router__fine="refine", router__refine_candidates=2),
            1,
        ),
        (
            moe(router__fine="refine", moe_router_topk=5),
            "moe.router.refine_candidates",
            "5 or 8",
            moe(router__fine="refine", moe_router_topk=5, router__refine_candidates=8),
            1,
        ),
        (
            moe(router={"fine": "refine", "num_groups": 4, "group_topk": 1}),
            "moe.router.refine_candidates",
            "choose 2",
            moe(router={"fine": "refine", "num_groups": 4, "group_topk": 2}),
            1,
        ),
    ],
    "only_a_bias_is_updated": [
        (
            moe(router__fine="none", moe_router_bias_update_rate=0.1),
            "moe.moe_router_bias_update_rate",
            '"bias"',
            moe(router__fine="none", moe_router_bias_update_rate=rate),
            1,
        )
        for rate in (0.0, 1e-3)
    ],
    "ranks_divide_the_experts": [
        ({**moe(num_experts=6), EP: 4}, EP, "1, 2, 3 or 6", {**moe(num_experts=6), EP: 3}, 12),
    ],
    "experts_elsewhere_need_an_exchange": [
        ({**moe(dispatcher="local"), EP: 2}, "moe.dispatcher", '"ring"', moe(dispatcher="local"), 2),
    ],
    "nodes_divide_the_expert_ranks": [
        (
            {**moe(dispatcher="hierarchical"), EP: 4, "parallel.expert_ranks_per_node": 3},
            "parallel.expert_ranks_per_node",
            "1, 2 or 4",
            {**moe(dispatcher="hierarchical"), EP: 4, "parallel.expert_ranks_per_node": 2},
            4,
        ),
        (
            {**moe(dispatcher="hierarchical"), EP: 2, "parallel.expert_ranks_per_node": 4},
            "parallel.expert_ranks_per_node",
            "1 or 2",
            {**moe(dispatcher="ring"), EP: 2, "parallel.expert_ranks_per_node": 4},
            2,
        ),
    ],
    "a_narrow_wire_is_narrower": [
        ({**moe(wire_dtype="bf16"), "fp16.enabled": True}, "moe.wire_dtype", '"same"', moe(wire_dtype="bf16"), 1),
    ],
    "experts_keep_whole_parameters": [
        (
            {**V2, EP: ranks, "zero_optimization.stage": 3},
            "zero_optimization.stage",
            "1 or 2",
            {**V2, EP: ranks, "zero_optimization.stage": 2},
            2,
        )
        for ranks in (1, 2)
    ],
    "experts_elsewhere_are_not_offloaded": [
        (
            {**V2, EP: 2, **OFFLOAD},
            "zero_optimization.offload_optimizer.device",
            '"none"',
            {**V2, EP: 2, "zero_optimization.stage": 2},
            2,
        ),
    ],
    "expert_ranks_divide_the_data_axis": [
        (
            {**V2, EP: 4, "parallel.pipeline_model_parallel_size": 2},
            EP,
            "that fit 4 are 1 x 1 x 4, 1 x 2 x 2, 1 x 1 x 2",
            {**V2, EP: 4},
            4,
        ),
        (
            {**V2, EP: 4, "parallel.pipeline_model_parallel_size": 2},
            EP,
            "choose 1 or 2, or launch 8 ranks",
            {**V2, EP: 2, "parallel.pipeline_model_parallel_size": 2},
            4,
        ),
    ],
}
CASES |= MOE_CASES | PARALLEL_CASES | SCHEDULE_CASES
ROWS = [(name, *case) for name, cases in CASES.items() for case in cases]


def test_every_rule_has_its_examples():
    assert set(CASES) == {rule.__name__ for rule in (*RULES, *WORLD_RULES)}


@pytest.mark.parametrize(("name", "bad", "place", "fix", "good", "ranks"), ROWS, ids=[row[0] for row in ROWS])
def test_the_rule_speaks_for_the_bad_example_alone(name, bad, place, fix, good, ranks):
    (found,) = broken(bad, ranks)
    assert found[0] == place
    assert fix in found[2]
    assert broken(good, ranks) == []


@pytest.mark.parametrize(("name", "bad", "place", "fix", "good", "ranks"), ROWS, ids=[row[0] for row in ROWS])
def test_it_is_that_rule(name, bad, place, fix, good, ranks):
    config = build(bad, Findings())
    speaks = [rule.__name__ for rule in RULES if list(rule(config))]
    speaks += [rule.__name__ for rule in WORLD_RULES if list(rule(config, ranks))]
    assert name in speaks


def test_a_rule_is_silent_about_values_that_are_known_to_be_wrong():
    findings = Findings()
    config = build({"model.num_query_groups": 5}, findings)
    findings.spoiled.append(("megatron_ds", "model", "num_attention_heads"))
    find_broken(config, 1, findings)
    assert findings.problems == []
    findings.spoiled[:] = [("megatron_ds", "model")]
    find_broken(config, 1, findings)
    assert findings.problems == []
    findings.spoiled[:] = [("megatron_ds", "model", "num_layers")]
    find_broken(config, 1, findings)
    assert [problem.path[-1] for problem in findings.problems] == ["num_query_groups"]
