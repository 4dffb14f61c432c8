"""Configuration of mds_moe: a decoder with sparse experts whose router has every stage that megatron_ds can train.

Names are those of stock families: Qwen's for the layout of layers, DeepSeek's for the router. Layers listed in
mlp_only_layers are dense, all others sparse. refine_candidates is None without a refine stage, n_group None without
groups of experts.
"""

from transformers import PretrainedConfig


class MdsMoeConfig(PretrainedConfig):
    """Sizes, router and rotary embedding."""

    model_type = "mds_moe"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012 (transformers reads it as is)

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        layer_types=None,
        sliding_window=None,
        use_qk_norm=False,
        rope_interleaved=True,
        mlp_only_layers=(),
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=2048,
        shared_expert_intermediate_size=None,
        scoring_func="softmax",
        n_group=None,
        topk_group=None,
        refine_candidates=None,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        rope_parameters=None,
        attention_dropout=0.0,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = head_dim
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.use_qk_norm = use_qk_norm
        self.rope_interleaved = rope_interleaved
        self.mlp_only_layers = list(mlp_only_layers)
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.scoring_func = scoring_func
        self.n_group, self.topk_group = n_group, topk_group
        self.refine_candidates = refine_candidates
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


__all__ = ["MdsMoeConfig"]
