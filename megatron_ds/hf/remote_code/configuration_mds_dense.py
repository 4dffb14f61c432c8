"""Configuration of mds_dense: a Llama-shaped decoder whose attention weighs far keys with a learned gate.

A key at distance d = i - j is local when d < local_window, as Hugging Face counts sliding_window. The setting is not
named sliding_window, and there are no layer_types: either would make the cache drop the far keys that the gate weighs.
"""

from transformers import PretrainedConfig


class MdsDenseConfig(PretrainedConfig):
    """Sizes, window and rotary embedding; names and meanings are Llama's where Llama has them."""

    model_type = "mds_dense"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        local_window=129,
        use_qk_norm=True,
        rope_interleaved=False,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_parameters=None,
        attention_dropout=0.0,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.local_window = local_window
        self.use_qk_norm = use_qk_norm
        self.rope_interleaved = rope_interleaved
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


__all__ = ["MdsDenseConfig"]
