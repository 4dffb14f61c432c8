"""The configuration tree: one frozen pydantic model per section, one leaf per setting.

The top level carries DeepSpeed's own keys (``deepspeed_keys.py``); everything that DeepSpeed has no name for lives
under ``"megatron_ds"``. A component receives its own section, never the root. The string below a field is its
documentation: the command line help and docs/configuration.md are made from it. Nothing here reads files or flags
(``load.py``), and rules between sections are in ``rules.py``.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ds.config.deepspeed_keys import (
    DeepSpeedKeys,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.token_schedule import COUNT, NUMBER, Scheduled, ScheduledBatch
from megatron_ds.config.values import Form

# --- parallel -------------------------------------------------------------------------------------------------------


class OneForwardOneBackward(Section):
    """The synchronous 1F1B schedule (PipeDream-flush)."""

    kind: Literal["1f1b"] = "1f1b"


class Interleaved(Section):
    """1F1B over virtual stages (arXiv 2104.04473): every rank holds several chunks of the model, in turn."""

    kind: Literal["interleaved"] = "interleaved"


class ZeroBubbleH1(Section):
    """ZB-H1 (arXiv 2401.10241): 1F1B whose weight gradients wait until nothing else can be done."""

    kind: Literal["zb_h1"] = "zb_h1"


class ZeroBubbleV(Section):
    """ZB-V (arXiv 2405.15362): two chunks per rank in the shape of a V, and weight gradients that wait."""

    kind: Literal["zb_v"] = "zb_v"


PipelineSchedule = Annotated[
    OneForwardOneBackward | Interleaved | ZeroBubbleH1 | ZeroBubbleV, Field(discriminator="kind")
]


class ParallelConfig(Section):
    """How many ranks each axis has; the data axis takes what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every matrix (1 in v1 and v2)."""
    sequence_parallel: bool = False
    """Share out the sequence, too, between the regions that tensor-parallel ranks compute together."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks of the pipeline."""
    num_virtual_stages_per_pipeline_rank: PositiveInt | None = None
    """Chunks of the model on each pipeline rank; by default 2 for interleaved and zb_v, else 1."""
    pipeline_model_parallel_layout: tuple[NonNegativeInt, ...] | None = None
    """Decoder layers of every virtual stage in order; by default they are shared out by cost."""
    schedule: PipelineSchedule = OneForwardOneBackward()
    """Order of the forward and backward passes in the pipeline."""
    expert_model_parallel_size: PositiveInt = 1
    """Data-parallel ranks that share the experts of a layer among them."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Tensor-parallel ranks that share every expert: 1, or tensor_model_parallel_size."""
    expert_ranks_per_node: PositiveInt | None = None
    """Ranks of a node for the hierarchical dispatcher; by default what the launcher says."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """How long a collective may wait for a peer before the run fails."""

    @property
    def num_chunks(self) -> int:
        """Model chunks (virtual stages) on each pipeline rank."""
        return self.num_virtual_stages_per_pipeline_rank or (2 if self.schedule.kind in ("interleaved", "zb_v") else 1)


# --- data -----------------------------------------------------------------------------------------------------------


class DataConfig(Section):
    """Where tokens come from. Paths name an .idx/.bin pair without its suffix."""

    data_path: tuple[str, ...] = ()
    """One prefix, or weights and prefixes in turn: 0.3 a 0.7 b."""
    split: Annotated[str, Field(pattern=r"^[\d.]+(\s*,\s*[\d.]+){0,2}$")] = "969,30,1"
    """Shares of the documents for training, validation and test."""
    eval_data_path: dict[str, tuple[str, ...]] = Field(default={})
    """Named validation sets (name=prefix, or a blend); by default the validation share of data_path."""
    tokenizer: str | None = None
    """Tokenizer directory (tokenizer.json); needed unless model.vocab_size and data.eod_id are given."""
    eod_id: NonNegativeInt | None = None
    """Id of the end-of-document token; by default the tokenizer's."""
    data_cache_path: str | None = None
    """Where sample indices are cached; by default a folder beside the data."""
    eod_mask_loss: bool = False
    """Leave out the loss at end-of-document inputs, whose target belongs to the next document."""


# --- training -------------------------------------------------------------------------------------------------------

LrPhase = Annotated[
    str,
    Field(pattern=rf"^{COUNT}:(constant(:{NUMBER})?|(linear|cosine|exponential):{NUMBER})$"),
    Form('of tokens:style or tokens:style:lr as "14.3T:cosine:2.2e-5"'),
]


class TrainingConfig(Section):
    """Length, learning rate schedule, evaluation and the ways to stop early."""

    train_iters: PositiveInt = 1000
    """Optimizer steps."""
    train_samples: PositiveInt | None = None
    """Length in sequences instead; schedules then count sequences, and train_iters follows."""
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Let the global batch grow: start, increment, and the sequences over which it reaches train_batch_size."""
    step_batch_size_schedule: ScheduledBatch | None = None
    """Global batch from given numbers of tokens on; the last is train_batch_size."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the learning rate after the warmup."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which min_lr is reached; by default train_iters."""
    lr_decay_samples: PositiveInt | None = None
    """The same in sequences, for runs with train_samples, which is the default."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Steps of linear warmup; not together with lr_warmup_fraction."""
    lr_warmup_samples: NonNegativeInt | None = None
    """The same in sequences, for runs with train_samples."""
    lr_warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Warmup as a share of lr_decay_iters, or of lr_decay_samples."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the first step of the warmup."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's final decay."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Length of WSD's final decay; by default a tenth of lr_decay_iters."""
    lr_wsd_decay_samples: PositiveInt | None = None
    """The same in sequences, for runs with train_samples."""
    lr_phases: tuple[LrPhase, ...] = ()
    """Phases after the warmup in place of lr_decay_style; each ends at a number of tokens; docs/learning_rate.md."""
    mtp_loss_scaling_factor: Scheduled = 0.1
    """Weight of the loss of MTP blocks; may change with the tokens consumed."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a running mean of the weights on the CPU: mean = decay * mean + (1 - decay) * weight after every step."""
    eval_interval: PositiveInt | None = 1000
    """Steps between evaluations; null evaluates only at the end."""
    eval_iters: PositiveInt | None = 100
    """Global batches per evaluation and set; null takes the whole set."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Seed of the initialisation, the sample order and dropout."""
    exit_interval: PositiveInt | None = None
    """Save and stop when the step is a multiple of this."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Save and stop after this many minutes."""
    skip_train: bool = False
    """Only evaluate."""
    self_test: bool = False
    """Only compare the gradients of a small copy of the run, under its topology, with those of one process."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: full layers, or only the core attention."""


class CheckpointConfig(Section):
    """Where checkpoints are written and read."""

    save: str | None = None
    """Checkpoint directory; by default the run directory's checkpoints/."""
    load: str | None = None
    """Directory to resume from, or a Hugging Face model to begin with; by default the save directory."""
    finetune: bool = False
    """Take only the weights of ``load`` and begin at step 0; once this run has a checkpoint of its own, resume that."""
    save_interval: PositiveInt | Literal["auto"] | None = 1000
    """Steps between checkpoints; null saves only at the end, auto weighs the cost of a save against a loss."""
    node_days_per_failure: PositiveFloat = 264.0
    """Days that one node runs between failures on average; for save_interval auto."""
    async_save: bool = True
    """Write in the background, from a copy in memory; training waits for the copy only."""
    keep_last: PositiveInt | None = None
    """Newest checkpoints to keep; older ones are removed once a newer one is verified. Null keeps all."""
    save_retain_interval: PositiveInt | None = None
    """Also keep checkpoints of steps that are multiples of this."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss."""
    local_save: str | None = None
    """Directory on a disk of the node, for checkpoints that are cheap and often."""
    local_save_interval: PositiveInt | None = None
    """Steps between checkpoints in ``local_save``, of which the last two are kept."""
    local_save_neighbour: bool = False
    """Keep a copy of each node's part on the next node, so that a lost disk costs nothing."""
    save_hf: Literal["last", "best", "every"] | None = None
    """Also export to Hugging Face, into hf/ beside the checkpoints: the newest, the best by validation, or all."""


class MonitorConfig(Section):
    """The run directory and what is written there."""

    run_dir: str = "runs"
    """Parent of all run directories."""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of this run; by default the configuration file's. The same name resumes."""
    log_interval: PositiveInt = 10
    """Steps between console lines; the ledger has every step."""
    dead_expert_steps: PositiveInt = 50
    """Warn when an expert has received no token for this many steps."""
    max_expert_imbalance: PositiveFloat = 4.0
    """Warn when the busiest expert of a layer has more than this multiple of the mean load."""


class MegatronDs(Section):
    """Our section of the JSON file."""

    generation: Literal["v1", "v2", "v3"] = "v1"
    """Which generation supplies the defaults and the rules: v1 dense, v2 mixture of experts, v3 all axes."""
    model: ModelConfig = ModelConfig()
    moe: MoEConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


class RunConfig(DeepSpeedKeys):
    """The whole tree: DeepSpeed's keys at the top, ours under ``megatron_ds``."""

    megatron_ds: MegatronDs = MegatronDs()
