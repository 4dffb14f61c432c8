"""Examples for the rules of ``parallel_rules.py``, in the form of ``test_config_rules.py``."""

TP, PP, EP = (f"parallel.{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
ETP, CHUNKS = "parallel.expert_tensor_parallel_size", "parallel.num_virtual_stages_per_pipeline_rank"
LAYOUT, KIND = "parallel.pipeline_model_parallel_layout", "parallel.schedule.kind"
SHARED, WIDTH = "moe.moe_shared_expert_intermediate_size", "moe.moe_ffn_hidden_size"
OFFLOAD = {"zero_optimization.offload_optimizer.device": "cpu"}
V3 = {"generation": "v3"}
FOUR = {"gradient_accumulation_steps": 4}
DENSE = {**V3, "moe": None}
MOE = {"generation": "v3", "moe": {}}

PARALLEL_CASES = {
    "matrices_are_whole": [
        ({TP: 2, **generation}, TP, '"v3"', {TP: 2, **generation, "generation": "v3"}, 2)
        for generation in ({}, {"generation": "v2", "moe": {}})
    ],
    "tensor_ranks_divide_the_heads": [
        ({**DENSE, TP: 8}, TP, "1, 2, 3, 4, 6 or 12", {**DENSE, TP: 4}, 8),
        (
            {**DENSE, TP: 4, "model.num_query_groups": 6},
            TP,
            "1, 2, 3, 6 or 12",
            {**DENSE, TP: 4, "model.num_query_groups": 2},
            4,
        ),
        (
            {**DENSE, TP: 4, "model.num_query_groups": 3},
            TP,
            "1, 3, 6 or 12",
            {**DENSE, TP: 4, "model.num_query_groups": 4},
            4,
        ),
    ],
    "tensor_ranks_divide_the_widths": [
        (
            {**DENSE, TP: 4, "model.ffn_hidden_size": 90},
            "model.ffn_hidden_size",
            "88 or 92",
            {**MOE, TP: 4, "model.ffn_hidden_size": 90, WIDTH: 96},
            4,
        ),
        (
            {**MOE, TP: 4, "model.ffn_hidden_size": 90, WIDTH: 96, "moe.moe_layer_freq": 2},
            "model.ffn_hidden_size",
            "88 or 92",
            {**MOE, TP: 2, "model.ffn_hidden_size": 90, WIDTH: 96, "moe.moe_layer_freq": 2},
            4,
        ),
        ({**MOE, TP: 4, SHARED: 90}, SHARED, "88 or 92", {**MOE, TP: 4, SHARED: 92}, 4),
        (
            {**MOE, TP: 4, ETP: 4, WIDTH: 90, "moe.experts": "loop"},
            WIDTH,
            "88 or 92",
            {**MOE, TP: 4, WIDTH: 90, "moe.experts": "loop"},
            4,
        ),
    ],
    "tensor_ranks_divide_the_vocabulary": [
        (
            {**DENSE, TP: 4, "model.make_vocab_size_divisible_by": 2},
            "model.make_vocab_size_divisible_by",
            "set it to 4",
            {**DENSE, TP: 4, "model.make_vocab_size_divisible_by": 4},
            4,
        ),
        (
            {**DENSE, TP: 4, "model.make_vocab_size_divisible_by": 6, "model.vocab_size": 5},
            "model.make_vocab_size_divisible_by",
            "set it to 12",
            {**DENSE, TP: 4, "model.make_vocab_size_divisible_by": 1, "model.vocab_size": 8},
            4,
        ),
    ],
    "tensor_ranks_divide_the_sequence": [
        (
            {**DENSE, TP: 4, "model.seq_length": 62},
            "model.seq_length",
            "60 or 64",
            {**DENSE, "model.seq_length": 62},
            4,
        ),
    ],
    "experts_are_whole_or_on_all_tensor_ranks": [
        ({**MOE, TP: 4, ETP: 2}, ETP, "1 or 4", {**MOE, TP: 4, ETP: 4}, 4),
        ({**DENSE, TP: 2, ETP: 2}, ETP, "set it to 1", {**DENSE, TP: 2}, 2),
    ],
    "tensor_ranks_shard_optimizer_states_only": [
        (
            {**DENSE, TP: 2, "zero_optimization.stage": 2},
            "zero_optimization.stage",
            "set it to 1",
            {**DENSE, "zero_optimization.stage": 2},
            2,
        ),
        ({**DENSE, TP: 2, **OFFLOAD}, "zero_optimization.offload_optimizer.device", '"none"', {**DENSE, **OFFLOAD}, 2),
    ],
    "schedules_need_a_pipeline": [
        ({KIND: kind}, KIND, "2 or more", {KIND: kind, PP: 2, **FOUR}, 2) for kind in ("interleaved", "zb_h1", "zb_v")
    ],
    "chunks_suit_the_schedule": [
        ({PP: 2, CHUNKS: 2}, CHUNKS, '"interleaved"', {PP: 2, CHUNKS: 1}, 2),
        ({PP: 2, CHUNKS: 2, KIND: "zb_h1"}, CHUNKS, '"interleaved"', {PP: 2, CHUNKS: 2, KIND: "zb_v"}, 2),
        ({PP: 2, CHUNKS: 3, KIND: "zb_v"}, CHUNKS, "set it to 2", {PP: 2, KIND: "zb_v"}, 2),
        (
            {PP: 2, CHUNKS: 1, KIND: "interleaved", **FOUR},
            CHUNKS,
            "2 or more",
            {PP: 2, CHUNKS: 3, KIND: "interleaved", **FOUR},
            2,
        ),
    ],
    "every_stage_has_a_layer": [
        ({PP: 4, "model.num_layers": 3}, PP, "at most 3", {PP: 4, "model.num_layers": 4}, 4),
        (
            {PP: 4, KIND: "zb_v", "model.num_layers": 7},
            PP,
            "at most 3 ranks, or give parallel.pipeline_model_parallel_layout",
            {PP: 4, KIND: "zb_v", "model.num_layers": 7, LAYOUT: [0, 1, 1, 1, 1, 1, 1, 1]},
            4,
        ),
        ({PP: 2, KIND: "zb_v", "model.num_layers": 3}, PP, "1f1b", {PP: 2, KIND: "zb_v", "model.num_layers": 4}, 2),
    ],
    "the_layout_has_every_layer_once": [
        ({PP: 2, LAYOUT: [4, 4, 4]}, LAYOUT, "list 2 numbers", {PP: 2, LAYOUT: [5, 7]}, 2),
        ({PP: 2, LAYOUT: [5, 6]}, LAYOUT, "num_layers to 11", {PP: 2, LAYOUT: [5, 6], "model.num_layers": 11}, 2),
        ({PP: 2, LAYOUT: [0, 12]}, LAYOUT, "give it one", {PP: 2, LAYOUT: [1, 11]}, 2),
        # Virtual stages 0 and 3 of a V are on one rank.
        (
            {PP: 2, KIND: "zb_v", LAYOUT: [0, 6, 6, 0]},
            LAYOUT,
            "give it one",
            {PP: 2, KIND: "interleaved", LAYOUT: [0, 6, 6, 0], **FOUR},
            2,
        ),
    ],
    "pipelines_shard_optimizer_states_only": [
        *(
            ({PP: 2, "zero_optimization.stage": stage}, "zero_optimization.stage", "set it to 1", {PP: 2}, 2)
            for stage in (2, 3)
        ),
        ({PP: 2, **OFFLOAD}, "zero_optimization.offload_optimizer.device", '"none"', OFFLOAD, 2),
    ],
    "axes_divide_the_world": [
        ({PP: 4}, PP, "launch 4 or 8 ranks; the nearest tensor x pipeline x expert sizes", {PP: 3}, 6),
        ({PP: 4}, PP, "that fit 6 are 1 x 3 x 1, 1 x 6 x 1, 1 x 2 x 1", {PP: 6}, 6),
        ({**DENSE, TP: 4, PP: 4}, PP, "that fit 8 are 2 x 4 x 1, 4 x 2 x 1, 1 x 4 x 1", {**DENSE, TP: 2, PP: 4}, 8),
        # Of 10 ranks 5 would be nearer to 4, but cannot share 12 heads.
        ({**DENSE, TP: 4}, PP, "that fit 10 are 2 x 1 x 1, 1 x 1 x 1", {**DENSE, TP: 2}, 10),
    ],
}
