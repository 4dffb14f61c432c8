"""Examples for the rules of ``schedule_rules.py``, in the form of ``test_config_rules.py``."""

RAMP, STEPS, PHASES = "training.rampup_batch_size", "training.step_batch_size_schedule", "training.lr_phases"
BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
INTERLEAVED = {
    "generation": "v3",
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.schedule": {"kind": "interleaved"},
}

SCHEDULE_CASES = {
    "schedules_go_forward": [
        ({**BATCH, STEPS: "0:8 2K:12 1K:16"}, STEPS, "in order", {**BATCH, STEPS: "0:8 1K:12 2K:16"}, 1),
        (
            {"training.mtp_loss_scaling_factor": "0:0.3 1K:0.2 1000:0.1", "model.mtp_num_layers": 1},
            "training.mtp_loss_scaling_factor",
            "in order",
            {"training.mtp_loss_scaling_factor": "0:0.3 1K:0.2 1001:0.1", "model.mtp_num_layers": 2},
            1,
        ),
        (
            {"generation": "v2", "moe.moe_router_bias_update_rate": "0:0.001 0:0"},
            "moe.moe_router_bias_update_rate",
            "in order",
            {"generation": "v2", "moe.moe_router_bias_update_rate": "0:0.001 14.3T:0"},
            1,
        ),
    ],
    "the_batch_grows_in_one_way": [
        ({**BATCH, STEPS: "0:8 1K:16", RAMP: [8, 8, 100]}, RAMP, "leave one", {**BATCH, STEPS: "0:8 1K:16"}, 1),
    ],
    "the_batch_grows_to_its_full_size": [
        ({**BATCH, RAMP: [4, 8, 100]}, RAMP, "to 12 or 20", {**BATCH, RAMP: [4, 6, 100]}, 1),
        ({**BATCH, RAMP: [24, 8, 100]}, RAMP, "to 24 or 32", {**BATCH, RAMP: [16, 8, 100]}, 1),
        ({**BATCH, STEPS: "0:8 1K:12"}, STEPS, "to 12", {**BATCH, STEPS: "0:16 1K:8 2K:16"}, 1),
        ({**BATCH, STEPS: "0:8 1K:32 2K:16"}, STEPS, "to 32", {**BATCH, STEPS: "0:8 1K:16"}, 1),
    ],
    "batches_on_the_way_are_whole": [
        ({**BATCH, RAMP: [4, 4, 100]}, RAMP, "8", {**BATCH, RAMP: [8, 8, 100]}, 4),
        ({**BATCH, STEPS: "0:9 1K:16"}, STEPS, "8 or 10", {**BATCH, STEPS: "0:8 1K:16"}, 1),
        (
            {**INTERLEAVED, **BATCH, "train_batch_size": 6},
            "train_batch_size",
            "4 or 8",
            {**INTERLEAVED, **BATCH, "train_batch_size": 8},
            2,
        ),
        (
            {**INTERLEAVED, **BATCH, RAMP: [6, 10, 100]},
            RAMP,
            "4 or 8",
            {**BATCH, "generation": "v3", "parallel.pipeline_model_parallel_size": 2, RAMP: [6, 10, 100]},
            2,
        ),
    ],
    "lengths_have_one_unit": [
        (
            {"training.lr_warmup_samples": 10},
            "training.lr_warmup_samples",
            "lr_warmup_iters",
            {"training.lr_warmup_samples": 10, "training.train_samples": 1000},
            1,
        ),
        (
            {"training.lr_decay_iters": 10, "training.train_samples": 1000},
            "training.lr_decay_iters",
            "lr_decay_samples",
            {"training.lr_decay_samples": 10, "training.train_samples": 1000},
            1,
        ),
        (
            {"training.lr_wsd_decay_iters": 10, "training.train_samples": 1000},
            "training.lr_wsd_decay_iters",
            "lr_wsd_decay_samples",
            {"training.lr_wsd_decay_samples": 10, "training.train_samples": 1000},
            1,
        ),
    ],
    "the_length_is_given_once": [
        (
            {**BATCH, "training.train_samples": 15},
            "training.train_samples",
            "16 or more",
            {**BATCH, "training.train_samples": 16},
            1,
        ),
        (
            {**BATCH, "training.train_samples": 170, "training.train_iters": 11},
            "training.train_iters",
            "leave one",
            {**BATCH, "training.train_samples": 170, "training.train_iters": 10},
            1,
        ),
    ],
    "phases_begin_after_the_warmup": [
        (
            {**BATCH, "training.lr_warmup_iters": 10, PHASES: ["327680:constant"], "optimizer.params.lr": 1e-3},
            PHASES,
            "shorten the warmup",
            {**BATCH, "training.lr_warmup_iters": 10, PHASES: ["327681:constant"], "optimizer.params.lr": 1e-3},
            1,
        ),
    ],
    "phases_follow_one_another": [
        ({PHASES: ["2K:constant", "1K:linear:0"]}, PHASES, "in order", {PHASES: ["1K:constant", "2K:linear:0"]}, 1),
        ({PHASES: ["2K:exponential:0"]}, PHASES, "linear", {PHASES: ["2K:exponential:1e-9"]}, 1),
    ],
    "phases_replace_the_decay": [
        (
            {PHASES: ["2K:constant"], "training.min_lr": 1e-8},
            "training.min_lr",
            "leave it out",
            {PHASES: ["2K:constant"]},
            1,
        ),
        (
            {PHASES: ["2K:constant"], "training.lr_decay_iters": 100},
            "training.lr_decay_iters",
            "leave it out",
            {PHASES: ["90M:constant"], "training.lr_decay_iters": 100, "training.lr_warmup_fraction": 0.1},
            1,
        ),
    ],
}
