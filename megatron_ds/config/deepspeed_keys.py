"""DeepSpeed's half of the tree: the keys that we read are typed, the ones we only pass on are listed, the rest refused.

What DeepSpeed's JSON already names (batch sizes, optimizer, clipping, precision, ZeRO) is set only there, so that every
value has one owner. A key that would contradict ours, or run into a known trap, is refused with the reason and the fix.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]

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
    "bfloat16": ("the section has one name here", "rename it to bf16"),
    "checkpoint": ("checkpoints are written in our format", "set megatron_ds.checkpoint"),
    "datastates_ckpt": ("checkpoints are written in our format", "set megatron_ds.checkpoint"),
    "hybrid_engine": ("it serves RLHF generation", "use megatron-ds generate"),
    "autotuning": ("it cannot drive pipelines", "leave it out"),
    "compile": ("our engine does not compile the module", "leave it out"),
    "weight_quantization": ("it applies to inference engines", "leave it out"),
    "aio": ("offloading goes to CPU memory only", "leave it out"),
    "zero_allow_untested_optimizer": ("every optimizer here is supported", "leave it out"),
    "zero_force_ds_cpu_optimizer": ("the optimizer is always PyTorch's AdamW", "leave it out"),
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

_OFFLOAD = "the section has one name here"
ZERO_REFUSED: dict[str, tuple[str, str]] = {
    "zero_quantized_weights": ("it rounds the weights on the wire", "leave it out"),
    "zero_quantized_nontrainable_weights": ("it rounds the weights on the wire", "leave it out"),
    "zero_quantized_gradients": ("it rounds gradients to 4 bits on the wire", "leave it out"),
    "cpu_offload": (_OFFLOAD, 'set offload_optimizer to {"device": "cpu"}'),
    "cpu_offload_param": (_OFFLOAD, 'set offload_param to {"device": "cpu"}'),
    "compute_grad_norm": ("the gradient norm is logged at every step", "leave it out"),
    "stage3_gather_16bit_weights_on_model_save": ("checkpoints are written in our format", "use megatron-ds export-hf"),
    "elastic_checkpoint": ("checkpoints are written in our format", "leave it out"),
    "load_from_fp32_weights": ("checkpoints are written in our format", "leave it out"),
    "zenflow": ("its asynchronous update changes the result", "leave it out"),
    **{
        key: ("DeepSpeed removed it", "leave it out")
        for key in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
    },
}
"""Keys of zero_optimization that are refused: the reason, and what to do instead."""

PIPELINE_REFUSED: dict[str, tuple[str, str]] = {
    "activation_checkpoint_interval": ("recomputation is ours", "set megatron_ds.training.recompute_granularity"),
    "use_reentrant": ("recomputation is ours", "leave it out"),
    "stages": ("stages are an axis of our topology", "set megatron_ds.parallel.pipeline_model_parallel_size"),
    "partition": ("layers are placed by our partition", "leave it out"),
    "seed_layers": ("it repeats the same dropout mask at every step", "set megatron_ds.training.seed"),
    "dynamic_shape": ("a stage knows its shapes from the configuration", "leave it out"),
}
"""Keys of pipeline that are refused: the reason, and what to do instead."""


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, documented by the strings below its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    refused: ClassVar[dict[str, tuple[str, str]]] = {}
    """Keys that are refused with a reason and a fix; one that only says "off" is dropped."""
    passed_on: ClassVar[dict[str, Any]] = {}
    """Keys that we do not read, with the types that DeepSpeed expects."""


class OptimizerParams(Section):
    """Hyper-parameters of AdamW."""

    lr: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate; auto is 5e-4 x global batch size / 256."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of the matrices; norms, biases and gates have none."""
    torch_adam: Literal[True] = True
    """PyTorch's fused AdamW; DeepSpeed's own would compile for a minute."""


class OptimizerKeys(Section):
    """The optimizer."""

    type: Literal["AdamW"] = "AdamW"
    """AdamW: Adam with decoupled weight decay."""
    params: OptimizerParams = OptimizerParams()


class OffloadKeys(Section):
    """Where ZeRO keeps a state between uses."""

    device: Literal["none", "cpu"] = "none"
    """cpu moves the state to host memory."""
    pin_memory: bool = True
    """Use page-locked host memory, which copies faster."""


class ZeroKeys(Section):
    """ZeRO: which of optimizer state (1), gradients (2) and parameters (3) are sharded over the data axis."""

    model_config = ConfigDict(extra="allow")
    refused: ClassVar[dict[str, tuple[str, str]]] = ZERO_REFUSED
    passed_on: ClassVar[dict[str, Any]] = {
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "overlap_comm": bool,
        "allgather_partitions": bool,
        "round_robin_gradients": bool,
        "use_multi_rank_bucket_allreduce": bool,
        "ignore_unused_parameters": bool,
        "memory_efficient_linear": bool,
        "log_trace_cache_warnings": bool,
        "sub_group_size": NonNegativeInt,
        "stage3_max_live_parameters": NonNegativeInt,
        "stage3_max_reuse_distance": NonNegativeInt,
        "stage3_prefetch_bucket_size": NonNegativeInt,
        "stage3_param_persistence_threshold": NonNegativeInt,
        "stage3_model_persistence_threshold": NonNegativeInt,
        "zero_hpz_partition_size": PositiveInt,
        "offload_optimizer": OffloadKeys,
        "offload_param": OffloadKeys,
    }

    stage: Literal[0, 1, 2, 3] = 1
    """0 shards nothing; each stage shards one more kind of state."""
    reduce_bucket_size: PositiveInt = 5_000_000
    """Elements reduced at a time; DeepSpeed allocates a buffer of this size at once."""
    allgather_bucket_size: Annotated[int, Field(gt=0, multiple_of=2)] = 5_000_000
    """Elements gathered at a time; even, which DeepSpeed needs to align its buffers."""

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Names of the states that are kept in host memory: offload_optimizer, offload_param."""
        given = self.model_extra or {}
        return tuple(
            name for name in ("offload_optimizer", "offload_param") if given.get(name, {}).get("device") == "cpu"
        )


class Bf16Keys(Section):
    """bfloat16 training: fp32 master weights and gradient accumulation."""

    enabled: bool = False
    """Weights and activations in bfloat16."""


class Fp16Keys(Section):
    """float16 training with dynamic loss scaling (loss_scale 0) or a fixed one."""

    enabled: bool = False
    """Weights and activations in float16."""
    loss_scale: NonNegativeFloat = 0
    """Fixed loss scale; 0 adapts it."""
    initial_scale_power: NonNegativeInt = 16
    """The adapted scale starts at 2 to this power."""
    loss_scale_window: PositiveInt = 1000
    """Steps without overflow before the scale doubles."""
    hysteresis: PositiveInt = 2
    """Overflows before the scale is halved."""
    min_loss_scale: PositiveFloat = 1
    """The scale is never smaller."""


class DataTypeKeys(Section):
    """Type in which micro-batch gradients are summed."""

    grad_accum_dtype: Literal["fp32"] = "fp32"
    """bf16 gradients are summed in fp32; fp32 and fp16 gradients in their own type."""


class PipelineKeys(Section):
    """DeepSpeed's pipeline section; our engine moves whole activations."""

    refused: ClassVar[dict[str, tuple[str, str]]] = PIPELINE_REFUSED

    pipe_partitioned: Literal[False] = False
    """Activations travel whole."""
    grad_partitioned: Literal[False] = False
    """Their gradients too."""


class WandbKeys(Section):
    """Weights & Biases; offline unless there is a login."""

    enabled: bool = False
    """Write to Weights & Biases."""
    project: str = "megatron_ds"
    """Project of the run."""
    team: str | None = None
    """Team or user that owns the project; by default the login's."""
    group: str | None = None
    """Group that the run belongs to."""


class WriterKeys(Section):
    """One of DeepSpeed's metric writers (tensorboard, csv_monitor, comet); receives our metrics as events."""

    model_config = ConfigDict(extra="allow")
    passed_on: ClassVar[dict[str, Any]] = {"output_path": str, "job_name": str}

    enabled: bool = False
    """Write our metrics there."""


class CometKeys(WriterKeys):
    """DeepSpeed's Comet writer; receives our metrics as events."""

    refused: ClassVar[dict[str, tuple[str, str]]] = {
        "api_key": ("the configuration is saved with every checkpoint", "set COMET_API_KEY in the environment"),
    }
    passed_on: ClassVar[dict[str, Any]] = {
        "samples_log_interval": PositiveInt,
        "project": str,
        "workspace": str,
        "experiment_name": str,
        "experiment_key": str,
        "online": bool,
        "mode": Literal["get", "create", "get_or_create"],
    }


class CommsLoggerKeys(Section):
    """DeepSpeed's log of its collectives."""

    enabled: bool = False
    """Record every collective that goes through deepspeed.comm."""
    verbose: bool = False
    """Print each one."""
    prof_all: bool = True
    """Record all operations rather than those in prof_ops."""
    prof_ops: tuple[str, ...] = ()
    """Names of the operations to record."""
    debug: bool = False
    """Add the caller to each record."""


class DeepSpeedKeys(Section):
    """DeepSpeed's top-level keys that a run may set."""

    refused: ClassVar[dict[str, tuple[str, str]]] = REFUSED

    train_batch_size: PositiveInt | None = None
    """Sequences per optimizer step over all ranks; two of the three batch keys give the third."""
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """Sequences in one forward pass on one rank."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimizer step and data-parallel rank."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    steps_per_print: PositiveInt | None = None
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
    comet: CometKeys = CometKeys()
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Type of the gradients on the wire; by default fp32, in an fp16 run fp16."""
    prescale_gradients: bool = False
    """Divide gradients before the reduction rather than after it."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """Part of that division that is done before the reduction."""
    comms_logger: CommsLoggerKeys = CommsLoggerKeys()
    dump_state: bool = False
    """Print DeepSpeed's engine state at the start."""
    memory_breakdown: bool = False
    """Print memory use around forward, backward and step."""
    disable_python_gc: bool = False
    """Turn Python's garbage collector off during training."""

    @property
    def dtype_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """Type of the weights and activations in the forward pass."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"
