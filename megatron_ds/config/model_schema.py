"""The ``model`` section: sizes, attention, rotary embedding, prediction of further tokens.

Part of the tree of ``schema.py``, with its conventions: the string below a field is its documentation.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ds.config.deepspeed_keys import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)

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


class LatentAttention(Section):
    """Multi-head latent attention (arXiv 2405.04434): keys and values are made from one small vector per token."""

    kind: Literal["latent"] = "latent"
    q_lora_rank: PositiveInt | None = None
    """Width that queries are compressed to; by default they are not."""
    kv_lora_rank: PositiveInt = 512
    """Width that keys and values are compressed to."""
    qk_head_dim: PositiveInt = 128
    """Channels of a query or key head without a position."""
    qk_pos_emb_head_dim: PositiveInt = 64
    """Channels of a query or key head with a rotary position; those of the key are shared by all heads."""
    v_head_dim: PositiveInt = 128
    """Channels of a value head."""


Attention = Annotated[
    FullAttention | HybridAttention | SoftGateAttention | LatentAttention, Field(discriminator="kind")
]


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
    """Multiplier of cos and sin; when not set it follows from the mscales, or is 0.1 ln(factor) + 1 without them."""
    mscale: NonNegativeFloat | None = None
    """DeepSeek's form: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1."""
    mscale_all_dim: NonNegativeFloat | None = None
    """DeepSeek's form: latent attention multiplies its scores by m(mscale_all_dim) squared."""


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
    add_qkv_bias: bool = False
    """A bias on the projections of queries, keys and values; no other matrix has one."""
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
    mtp_num_layers: NonNegativeInt = 0
    """Blocks that each predict one token further (multi-token prediction, arXiv 2412.19437); see docs/model.md."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn with the position."""
        return self.attention.qk_pos_emb_head_dim if isinstance(self.attention, LatentAttention) else self.head_dim

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
