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
    Probability,
    Section,
)
from megatron_ds.config.moe_schema import MoEConfig

Stretch = Annotated[float, Field(ge=1)]


# --- model: attention -----------------------------------------------------------------------------------------------


class FullAttention(Section):
    """Every layer sees the whole document (causally)."""

    kind: Literal["full"] = "full"


class WindowGrowth(Section):
    """The window grows linearly from ``start`` to its final width over ``iters`` optimizer steps."""

    start: PositiveInt
    """Window width at the first step, in tokens of distance."""
    iters: PositiveInt
    """Steps until the full width is reached."""


class HybridAttention(Section):
    """Local and global layers in a repeating pattern; a key at distance d = i - j <= window is local."""

    kind: Literal["hybrid"] = "hybrid"
    pattern: Annotated[str, Field(pattern=r"^[LG]+$")] = "LLLG"
    """One letter per layer, repeated over the depth: L local, G global."""
    window: PositiveInt = 256
    """Largest distance that a local layer sees; Hugging Face's sliding_window is this plus one."""
    window_growth: WindowGrowth | None = None
    """Optional schedule that widens the window during training."""


class SoftGateAttention(Section):
    """softmax(score + [d > window] * log g): g, learned per token and head, weighs the far keys."""

    kind: Literal["soft_gate"] = "soft_gate"
    window: PositiveInt = 128
    """Largest distance that the gate leaves alone."""
    implementation: Literal["lse", "bias"] = "lse"
    """lse mixes a local and a full attention by their log-sum-exps; bias adds log g to the scores."""
    initial_gate: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Value of g at initialisation; 0.9 starts close to full attention."""


Attention = Annotated[FullAttention | HybridAttention | SoftGateAttention, Field(discriminator="kind")]


# --- model: rotary embedding ----------------------------------------------------------------------------------------


class DefaultRope(Section):
    """Rotary embedding without scaling."""

    kind: Literal["default"] = "default"


class LinearRope(Section):
    """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: Stretch
    """How many times longer the context becomes."""


class Llama3Rope(Section):
    """Llama 3.1's frequency-dependent interpolation."""

    kind: Literal["llama3"] = "llama3"
    factor: Stretch = 8.0
    """How many times longer the context becomes."""
    low_freq_factor: PositiveFloat = 1.0
    """Frequencies below original / this are interpolated in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Frequencies above original / this are kept."""
    original_max_position_embeddings: PositiveInt = 8192
    """Context of the model before the extension."""


class YarnRope(Section):
    """YaRN (arXiv 2309.00071): interpolate the slow frequencies, keep the fast ones, rescale the attention."""

    kind: Literal["yarn"] = "yarn"
    factor: Stretch
    """How many times longer the context becomes."""
    original_max_position_embeddings: PositiveInt
    """Context of the model before the extension."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies that turn more often than this within the original context are kept."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies that turn less often than this are interpolated in full."""
    attention_factor: PositiveFloat | None = None
    """Multiplier of cos and sin; 0.1 ln(factor) + 1 when not set."""


RopeScaling = Annotated[DefaultRope | LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


class ModelConfig(Section):
    """The decoder: sizes, attention, embedding, initialisation."""

    num_layers: PositiveInt = 12
    """Decoder layers."""
    hidden_size: PositiveInt = 768
    """Model width D."""
    ffn_hidden_size: PositiveInt | None = None
    """Feed-forward width F; by default 8/3 of hidden_size, rounded down to a multiple of 64."""
    num_attention_heads: PositiveInt = 12
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); by default as many as query heads."""
    kv_channels: PositiveInt | None = None
    """Width of one head; by default hidden_size / num_attention_heads."""
    seq_length: PositiveInt = 2048
    """Tokens in a training sample."""
    max_position_embeddings: PositiveInt | None = None
    """Longest position the exported model declares; by default seq_length."""
    vocab_size: PositiveInt | None = None
    """Size of the true vocabulary; by default the tokenizer's."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this; padded entries never receive probability."""
    attention: Attention = HybridAttention()
    """Which keys a query sees, see docs/attention.md."""
    qk_layernorm: bool = True
    """RMSNorm on every query and key head before the rotary embedding."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies (theta)."""
    rotary_interleaved: bool = False
    """Turn neighbouring channels (2c, 2c + 1) as pairs, instead of channels c and c + K/2."""
    rope_scaling: RopeScaling = DefaultRope()
    """Context extension of the rotary embedding."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights, see docs/model.md."""
    hidden_dropout: Probability = 0.0
    """Dropout after the embedding, the attention and the feed-forward block."""
    attention_dropout: Probability = 0.0
    """Dropout on the attention probabilities."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward block (Megatron's rule for SwiGLU when not set)."""
        return self.ffn_hidden_size or max(64, int(self.hidden_size * 8 / 3) // 64 * 64)

    @property
    def max_positions(self) -> int:
        """Longest sequence the exported model declares."""
        return self.max_position_embeddings or self.seq_length

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer before the model is built"
        return -(-self.vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by


# --- parallel -------------------------------------------------------------------------------------------------------


class OneForwardOneBackward(Section):
    """The synchronous 1F1B schedule (PipeDream-flush)."""

    kind: Literal["1f1b"] = "1f1b"


class ParallelConfig(Section):
    """How many ranks each axis has; the data axis takes what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every matrix (1 in v1 and v2)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""
    expert_model_parallel_size: PositiveInt = 1
    """Data-parallel ranks that share the experts of a layer among them."""
    expert_ranks_per_node: PositiveInt | None = None
    """Ranks of a node for the hierarchical dispatcher; by default what the launcher says."""
    schedule: OneForwardOneBackward = OneForwardOneBackward()
    """Order of the forward and backward passes in the pipeline."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """How long a collective may wait for a peer before the run fails."""


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


class TrainingConfig(Section):
    """Length, learning rate schedule, evaluation and the ways to stop early."""

    train_iters: PositiveInt = 1000
    """Optimizer steps."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the learning rate after the warmup."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which min_lr is reached; by default train_iters."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Steps of linear warmup; not together with lr_warmup_fraction."""
    lr_warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Warmup as a share of lr_decay_iters."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the first step of the warmup."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's final decay."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Length of WSD's final decay; by default a tenth of lr_decay_iters."""
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
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: full layers, or only the core attention."""


class CheckpointConfig(Section):
    """Where checkpoints are written and read."""

    save: str | None = None
    """Checkpoint directory; by default the run directory's checkpoints/."""
    load: str | None = None
    """Directory to resume from; by default the save directory."""
    save_interval: PositiveInt | None = 1000
    """Steps between checkpoints; null saves only at the end."""


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

    generation: Literal["v1", "v2"] = "v1"
    """Which generation supplies the defaults and the rules: v1 dense, v2 mixture of experts."""
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
