"""Megatron's command line, as far as it differs from the schema: tables only.

Every leaf of ``megatron_ds`` already is a flag of Megatron's spelling (``flags.py``). What is left are flags that write
DeepSpeed's keys, other names for one setting, flags for what is always so here, and flags that are refused. From these
tables come the parser, ``--help``, did-you-mean and docs/from_megatron.md.
"""

from typing import Any

ALIASES: dict[str, str] = {
    "--micro-batch-size": "train_micro_batch_size_per_gpu",
    "--global-batch-size": "train_batch_size",
    "--gradient-accumulation-steps": "gradient_accumulation_steps",
    "--lr": "optimizer.params.lr",
    "--weight-decay": "optimizer.params.weight_decay",
    "--adam-beta1": "optimizer.params.betas.0",
    "--adam-beta2": "optimizer.params.betas.1",
    "--adam-eps": "optimizer.params.eps",
    "--clip-grad": "gradient_clipping",
    "--bf16": "bf16.enabled",
    "--fp16": "fp16.enabled",
    "--loss-scale": "fp16.loss_scale",
    "--loss-scale-window": "fp16.loss_scale_window",
    "--min-loss-scale": "fp16.min_loss_scale",
    "--hysteresis": "fp16.hysteresis",
    "--zero-stage": "zero_optimization.stage",
    "--zero-reduce-bucket-size": "zero_optimization.reduce_bucket_size",
    "--zero-allgather-bucket-size": "zero_optimization.allgather_bucket_size",
    "--wandb": "wandb.enabled",
    "--wandb-project": "wandb.project",
    "--wandb-entity": "wandb.team",
    "--wandb-group": "wandb.group",
    "--wandb-exp-name": "monitor.run_name",
    "--tensorboard-dir": "tensorboard.output_path",
    "--num-key-value-heads": "model.num_query_groups",
    "--layernorm-epsilon": "model.norm_epsilon",
    "--tokenizer-model": "data.tokenizer",
    "--topk": "moe.moe_router_topk",
    "--moe-router-score-function": "moe.router.kind",
    "--moe-router-num-groups": "moe.router.num_groups",
    "--moe-router-group-topk": "moe.router.group_topk",
    "--moe-router-topk-scaling-factor": "moe.router.scaling_factor",
    "--moe-expert-capacity-factor": "moe.capacity.factor",
    "--moe-token-drop-policy": "moe.capacity.drop_policy",
    "--moe-token-dispatcher-type": "moe.dispatcher",
    "--moe-expert-parallel-size": "parallel.expert_model_parallel_size",
    "--q-lora-rank": "model.attention.q_lora_rank",
    "--kv-lora-rank": "model.attention.kv_lora_rank",
    "--qk-head-dim": "model.attention.qk_head_dim",
    "--qk-pos-emb-head-dim": "model.attention.qk_pos_emb_head_dim",
    "--v-head-dim": "model.attention.v_head_dim",
    "--rope-type": "model.rope_scaling.kind",
    "--rotary-scaling-factor": "model.rope_scaling.factor",
    "--original-max-position-embeddings": "model.rope_scaling.original_max_position_embeddings",
    "--beta-fast": "model.rope_scaling.beta_fast",
    "--beta-slow": "model.rope_scaling.beta_slow",
    "--mscale": "model.rope_scaling.mscale",
    "--mscale-all-dim": "model.rope_scaling.mscale_all_dim",
}
"""Flags for DeepSpeed's keys, and second names: flag to path. A number in a path is an element of a list."""

IMPLIED: dict[str, tuple[str, Any]] = {
    "--wandb-project": ("wandb.enabled", True),
    "--tensorboard-dir": ("tensorboard.enabled", True),
    "--moe-expert-capacity-factor": ("moe.capacity.kind", "fixed"),
}
"""What a flag switches on besides its own value, unless another flag says otherwise."""

VALUES: dict[str, dict[str, str]] = {
    "--moe-token-dispatcher-type": {"alltoall": "all_to_all"},
    "--rope-type": {"rope": "default"},
}
"""Megatron's words for values that have another name here."""

SHORTHANDS: dict[str, tuple[str, Any]] = {
    "--use-distributed-optimizer": ("zero_optimization.stage", 1),
    "--no-pipeline-parallel": ("parallel.pipeline_model_parallel_size", 1),
    "--moe-grouped-gemm": ("moe.experts", "grouped_mm"),
    "--moe-router-pre-softmax": ("moe.router.norm_topk_prob", False),
    "--moe-router-enable-expert-bias": ("moe.router.fine", "bias"),
    "--disable-moe-token-dropping": ("moe.capacity.kind", "dropless"),
    "--multi-latent-attention": ("model.attention.kind", "latent"),
    "--enable-zbh1-pipeline": ("parallel.schedule.kind", "zb_h1"),
}
"""Flags without a value that stand for a setting."""

ALWAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "--swiglu": ((), "the feed-forward block is SwiGLU"),
    "--disable-bias-linear": ((), "only add_qkv_bias gives matrices a bias"),
    "--group-query-attention": ((), "num_query_groups alone decides"),
    "--use-rotary-position-embeddings": ((), "positions are rotary"),
    "--no-position-embedding": ((), "positions are rotary"),
    "--position-embedding-type": (("rope",), "positions are rotary"),
    "--rotary-percent": (("1", "1.0"), "all channels of a head are rotated"),
    "--normalization": (("RMSNorm", "rmsnorm"), "every norm is RMSNorm"),
    "--optimizer": (("adam", "adamw"), "the optimizer is AdamW"),
    "--weight-decay-incr-style": (("constant",), "weight decay is constant"),
    "--tokenizer-type": (("HuggingFaceTokenizer",), "tokenizers are tokenizer.json files"),
    "--dataloader-type": (("single",), "samples are read once, in an order fixed by the seed"),
    "--context-parallel-size": (("1",), "a sample is never cut over ranks"),
    "--account-for-embedding-in-pipeline-split": ((), "layers are shared out by cost, that of the embedding included"),
    "--account-for-loss-in-pipeline-split": ((), "layers are shared out by cost, that of the output included"),
    "--moe-router-dtype": (("fp32",), "routers compute in fp32"),
    "--moe-per-layer-logging": ((), "the ledger has the load of every layer"),
    "--create-moe-param-group": ((), "experts have parameter groups of their own"),
    "--mlp-type": (("standard",), "moe_shared_expert_intermediate_size alone decides about a shared expert"),
    "--reset-position-ids": ((), "positions restart at every document"),
    "--reset-attention-mask": ((), "packed documents never see each other"),
    "--attention-softmax-in-fp32": ((), "the softmax is computed in fp32"),
    "--accumulate-allreduce-grads-in-fp32": ((), "bf16 gradients are summed and reduced in fp32"),
    "--check-for-nan-in-loss-and-grad": ((), "a loss that is not finite ends the run"),
    "--log-throughput": ((), "the ledger has the throughput of every step"),
}
"""What is always so here: the values that are accepted (none for a switch), and the fact."""

_RECOMPUTE = ("Megatron renamed it", "use --recompute-granularity full")
_TOKENS = ("length is counted in steps or sequences", "use --train-iters or --train-samples")
_TOKENS_LR = ("warmup and decay count what the length of the run counts",
              "use --lr-decay-samples and --lr-warmup-samples, or --lr-phases")  # fmt: skip
_TOKENIZER = ("a tokenizer is one directory with tokenizer.json", "use --tokenizer DIR")
_SPLITS = ("training data comes from data_path", "use --data-path, and --eval-data-path NAME=PREFIX for validation")
_BALANCE = ("every balancing loss has a coefficient of its own, and they add up",
            "use --moe-aux-loss-coeff, --moe-seq-aux-loss-coeff or --moe-global-aux-loss-coeff")  # fmt: skip
_PADDING = ("experts compute the rows that they have, without padding", "leave it out")
_EXCHANGE = ("the exchange is one of our dispatchers", "use --dispatcher ring")
_LAYOUT = (
    "chunks are counted per rank, and their layers listed",
    "use --num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout",
)
_WHOLE = ("a checkpoint is always saved whole", "leave it out")
_WEIGHTS = ("a checkpoint is loaded whole, or its weights alone", "use --finetune")
_MODEL = ("the feed-forward block is SwiGLU without biases", "leave it out")
_OURS = ("overlap is the engine's business", "leave it out")
REFUSED_FLAGS: dict[str, tuple[str, str]] = {
    "--batch-size": ("Megatron renamed it", "use --micro-batch-size"),
    "--warmup": ("Megatron renamed it", "use --lr-warmup-fraction"),
    "--model-parallel-size": ("Megatron renamed it", "use --tensor-model-parallel-size"),
    "--checkpoint-activations": _RECOMPUTE,
    "--deepspeed-activation-checkpointing": _RECOMPUTE,
    "--recompute-activations": ("Megatron renamed it", "use --recompute-granularity selective"),
    "--recompute-method": ("every layer is recomputed alike", "use --recompute-granularity full"),
    "--recompute-num-layers": ("every layer is recomputed alike", "use --recompute-granularity full"),
    "--train-tokens": _TOKENS,
    "--lr-decay-tokens": _TOKENS_LR,
    "--lr-warmup-tokens": _TOKENS_LR,
    "--initial-loss-scale": ("DeepSpeed takes its logarithm", "use --set fp16.initial_scale_power=16"),
    "--vocab-file": _TOKENIZER,
    "--merge-file": _TOKENIZER,
    "--train-data-path": _SPLITS,
    "--valid-data-path": _SPLITS,
    "--test-data-path": _SPLITS,
    "--window-size": ("a window belongs to a kind of attention", "use --attention hybrid --attention-window N"),
    "--use-rope-scaling": ("scaling has several kinds", "use --rope-scaling llama3"),
    "--squared-relu": _MODEL,
    "--expert-interval": ("Megatron renamed it, and counts from the first layer", "use --moe-layer-freq"),
    "--moe-loss-coeff": ("Megatron renamed it", "use --moe-aux-loss-coeff"),
    "--moe-router-load-balancing-type": _BALANCE,
    "--moe-train-capacity-factor": ("Megatron renamed it", "use --moe-expert-capacity-factor"),
    "--moe-eval-capacity-factor": ("evaluation never drops a token", "leave it out"),
    "--moe-min-capacity": ("the slots of an expert follow from the factor", "use --moe-expert-capacity-factor"),
    "--moe-pad-expert-input-to-capacity": _PADDING,
    "--moe-router-padding-for-fp8": _PADDING,
    "--moe-enable-deepep": _EXCHANGE,
    "--use-tutel": _EXCHANGE,
    "--moe-permute-fusion": _OURS,
    "--moe-shared-expert-overlap": _OURS,
    "--moe-use-legacy-grouped-gemm": ("PyTorch has the grouped product", "use --moe-grouped-gemm"),
    "--moe-router-force-load-balancing": ("it ignores what the router learns", "leave it out"),
    "--moe-use-upcycling": ("experts start from their own seeds", "leave it out"),
    "--moe-top2-2nd-expert-sampling": ("the choice of experts is not random", "leave it out"),
    "--num-layers-per-virtual-pipeline-stage": _LAYOUT,
    "--decoder-first-pipeline-num-layers": _LAYOUT,
    "--decoder-last-pipeline-num-layers": _LAYOUT,
    "--microbatch-group-size-per-virtual-pipeline-stage": ("a group has one micro-batch per rank", "leave it out"),
    "--delay-wgrad-compute": ("weight gradients wait in zero-bubble schedules", "use --schedule zb_h1 or zb_v"),
    "--use-tp-pp-dp-mapping": ("ranks are numbered pipeline, data, tensor from the outside in", "leave it out"),
    "--overlap-p2p-communication": _OURS,
    "--tp-comm-overlap": _OURS,
    "--overlap-moe-expert-parallel-comm": _OURS,
    "--overlap-grad-reduce": _OURS,
    "--overlap-param-gather": _OURS,
    "--distributed-backend": ("it follows from the accelerator", "leave it out"),
    "--use-flash-attn": ("PyTorch chooses the attention kernel", "leave it out"),
    "--num-workers": ("the sample order does not depend on workers", "leave it out"),
    "--mock-data": ("a corpus is built in a minute", "run megatron-ds prepare-data"),
    "--no-save-optim": _WHOLE,
    "--no-save-rng": _WHOLE,
    "--no-load-optim": _WEIGHTS,
    "--no-load-rng": _WEIGHTS,
    "--use-checkpoint-args": ("the configuration file decides", "pass the run's config.json as --deepspeed_config"),
    "--wandb-save-dir": ("W&B files live in the run directory", "use --run-dir"),
}
"""Flags of Megatron-LM and Megatron-DeepSpeed that are refused: the reason, and what to do instead."""
