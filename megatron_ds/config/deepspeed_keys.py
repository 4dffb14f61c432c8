"""DeepSpeed's half of the tree: the keys that we read are typed, the ones we only pass on are listed, the rest refused.

What DeepSpeed's JSON already names (batch sizes, optimizer, clipping, precision, ZeRO) is set only there, so that every
value has one owner. A key that would contradict ours, or run into a known trap, is refused with the reason and the fix.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, documented by the strings below its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class OptimizerParams(Section):
    """Hyper-parameters of AdamW."""

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; auto is 5e-4 x global batch size / 256."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay of the matrices; norms, biases and gates have none."""
    torch_adam: Literal[True] = True
    """PyTorch's fused AdamW; DeepSpeed's own would compile for a minute."""


class OptimizerKeys(Section):
    """The optimizer."""

    type: Literal["AdamW"] = "AdamW"
    params: OptimizerParams = OptimizerParams()


class ZeroKeys(Section):
    """ZeRO: which of optimizer state (1), gradients (2) and parameters (3) are sharded over the data axis."""

    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 1
    reduce_bucket_size: Annotated[int, Field(gt=0)] = 5_000_000
    """Elements reduced at a time; DeepSpeed allocates a buffer of this size at once."""
    allgather_bucket_size: Annotated[int, Field(gt=0)] = 5_000_000


class Bf16Keys(Section):
    """bfloat16 training: fp32 master weights and gradient accumulation."""

    enabled: bool = False


class Fp16Keys(Section):
    """float16 training with dynamic loss scaling (loss_scale 0) or a fixed one."""

    enabled: bool = False
    loss_scale: Annotated[float, Field(ge=0)] = 0
    initial_scale_power: Annotated[int, Field(ge=0)] = 16
    loss_scale_window: Annotated[int, Field(gt=0)] = 1000
    hysteresis: Annotated[int, Field(gt=0)] = 2
    min_loss_scale: Annotated[float, Field(gt=0)] = 1


class DataTypeKeys(Section):
    """Type in which micro-batch gradients are summed."""

    grad_accum_dtype: Literal["fp32"] = "fp32"


class PipelineKeys(Section):
    """DeepSpeed's pipeline section; our engine moves whole activations."""

    pipe_partitioned: Literal[False] = False
    grad_partitioned: Literal[False] = False


class WandbKeys(Section):
    """Weights & Biases; offline unless there is a login."""

    enabled: bool = False
    project: str = "megatron_ds"
    team: str | None = None
    group: str | None = None


class WriterKeys(Section):
    """One of DeepSpeed's metric writers (tensorboard, csv_monitor, comet); receives our metrics as events."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = False


class DeepSpeedKeys(Section):
    """DeepSpeed's top-level keys that a run may set."""

    train_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Sequences per optimizer step over all ranks; two of the three batch keys give the third."""
    train_micro_batch_size_per_gpu: Annotated[int, Field(gt=0)] | None = None
    """Sequences in one forward pass on one rank."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] | None = None
    """Micro-batches per optimizer step and data-parallel rank."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    steps_per_print: Annotated[int, Field(gt=0)] | None = None
    """DeepSpeed's own progress line; off, ours says more."""
    optimizer: OptimizerKeys = OptimizerKeys()
    zero_optimization: ZeroKeys = ZeroKeys()
    bf16: Bf16Keys = Bf16Keys()
    fp16: Fp16Keys = Fp16Keys()
    data_types: DataTypeKeys = DataTypeKeys()
    pipeline: PipelineKeys = PipelineKeys()
    wandb: WandbKeys = WandbKeys()
    tensorboard: WriterKeys = WriterKeys()
    csv_monitor: WriterKeys = WriterKeys()
    comet: WriterKeys = WriterKeys()
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Type of the gradients on the wire; by default that of the gradients."""
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    comms_logger: dict[str, Any] | None = None
    dump_state: bool = False
    memory_breakdown: bool = False
    disable_python_gc: bool = False

    @property
    def dtype_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """Type of the weights and activations in the forward pass."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"


_ACCUMULATED = "accumulation and the loss scale are part of our step"
REFUSED: dict[str, tuple[str, str]] = {
    "scheduler": ("the learning rate is a pure function of the step here", "set megatron_ds.training.lr_decay_style"),
    "wall_clock_breakdown": ("its timers crash DeepSpeed's pipeline engine", "read perf/ in the ledger instead"),
    "flops_profiler": ("it forces wall_clock_breakdown, which crashes under pipelines", "read perf/mfu_pct instead"),
    "activation_checkpointing": ("the engine never configures it", "set megatron_ds.training.recompute_granularity"),
    "tensor_parallel": ("it starts DeepSpeed's AutoTP", "set parallel.tensor_model_parallel_size"),
    "expert_parallel": ("it starts DeepSpeed's AutoEP", "leave it out"),
    "sequence_parallel_size": ("it builds a device mesh that contradicts our groups", "leave it out"),
    "data_parallel_size": ("the data axis is what the other axes leave", "leave it out"),
    "use_data_before_expert_parallelism": ("expert groups come from our topology", "leave it out"),
    "data_efficiency": ("samples and their order come from megatron_ds.data", "leave it out"),
    "dataloader_drop_last": ("samples and their order come from megatron_ds.data", "leave it out"),
    "managed_gradient_accumulation": (_ACCUMULATED, "set gradient_accumulation_steps"),
    "gradient_allreduce_op": (_ACCUMULATED, "leave it out"),
    "torch_autocast": ("precision is set by bf16 or fp16", 'set "bf16": {"enabled": true}'),
    "checkpoint": ("checkpoints are written in our format", "set megatron_ds.checkpoint"),
    "datastates_ckpt": ("checkpoints are written in our format", "set megatron_ds.checkpoint"),
    "hybrid_engine": ("it serves RLHF generation", "use megatron-ds generate"),
    "autotuning": ("it cannot drive pipelines", "leave it out"),
    "compile": ("our engine does not compile the module", "leave it out"),
    "weight_quantization": ("it applies to inference engines", "leave it out"),
    "zero_allow_untested_optimizer": ("every optimizer here is supported", "leave it out"),
    "vocabulary_size": ("the vocabulary is the tokenizer's", "set megatron_ds.model.vocab_size"),
    **{
        key: ("DeepSpeed removed it", "leave it out")
        for key in (
            "amp", "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue",
            "sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
        )
    },
}  # fmt: skip
"""Top-level keys that are refused: the reason, and what to do instead."""

ZERO_KEYS = frozenset(
    "contiguous_gradients reduce_scatter overlap_comm allgather_partitions round_robin_gradients sub_group_size "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold offload_optimizer offload_param "
    "zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients ignore_unused_parameters "
    "use_multi_rank_bucket_allreduce memory_efficient_linear log_trace_cache_warnings".split()
)
"""Keys of zero_optimization that are passed to DeepSpeed unread."""
