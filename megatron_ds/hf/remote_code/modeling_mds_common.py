"""What mds_dense and mds_moe share: a pre-norm decoder with grouped keys, RMSNorm, SwiGLU and rotary embedding.

A family says what its layers are made of, and what their attention is told besides the tokens (masks, above all).
These files may import only torch, transformers and each other. Suffixes of tensor names: B batch, Q query slots, C
cache slots (keys), D model, H heads, G key/value heads, K head dim; T tokens, E experts, and in a router K the chosen
and C the candidate experts of a token.
"""

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"this model needs transformers 5 or newer; this is {transformers.__version__}")


class MdsRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: normalised in fp32, cast back, then scaled."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MdsRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, fp32 [B, 1, Q, K/2].

    transformers refills non-persistent buffers after a load only for classes named ...RotaryEmbedding that have exactly
    these attributes; under another name the frequencies would be uninitialised memory.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        default = self.rope_type == "default"
        frequencies = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs):
        """Frequencies theta^(-2k/K) of the unscaled embedding, and its attention factor 1."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    def forward(self, x, position_ids):
        angle = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return (angle.cos() * self.attention_scaling).unsqueeze(1), (angle.sin() * self.attention_scaling).unsqueeze(1)


def rotate(x, cos, sin, interleaved=False):
    """Rotary embedding: channel k turns with k + K/2, in the dtype of x, or 2k with 2k + 1, in fp32."""
    if interleaved:
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
    (first, second), cos, sin = x.chunk(2, dim=-1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as it is written on paper; the reference for every other implementation."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weight = query @ key.transpose(2, 3) * scaling + attention_mask
    weight = weight.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weight = nn.functional.dropout(weight, p=dropout, training=module.training)
    return (weight @ value).transpose(1, 2).contiguous(), weight


class MdsAttention(nn.Module):
    """Grouped-query attention; queries and keys may be normalised by head before they are rotated."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        norm = MdsRMSNorm if config.use_qk_norm else lambda width, eps: nn.Identity()
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BQD, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        heads = (*x_BQD.shape[:-1], -1, self.head_dim)
        query_BHQK = self.q_norm(self.q_proj(x_BQD).view(heads)).transpose(1, 2)
        key_BGCK = self.k_norm(self.k_proj(x_BQD).view(heads)).transpose(1, 2)
        query_BHQK = rotate(query_BHQK, *position_embeddings, self.config.rope_interleaved)
        key_BGCK = rotate(key_BGCK, *position_embeddings, self.config.rope_interleaved)
        value_BGCK = self.v_proj(x_BQD).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key_BGCK, value_BGCK = past_key_values.update(key_BGCK, value_BGCK, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out_BQHK, weight_BHQC = attend(
            self, query_BHQK, key_BGCK, value_BGCK, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out_BQHK.reshape(*x_BQD.shape[:-1], -1)), weight_BHQC


class MdsMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MdsDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward block, both of the family's kind."""

    def __init__(self, config, attention, mlp):
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = MdsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MdsRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BQD, **kwargs):
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), **kwargs)[0]
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class MdsModelMixin:
    """Embedding, decoder layers and final norm; stands before the family's PreTrainedModel."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.build_layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MdsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MdsRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def build_layer(config, index):
        """The decoder layer ``index``."""
        raise NotImplementedError

    def attention_inputs(self, x_BQD, **mask_inputs):
        """Keyword arguments of each layer's attention, in order; ``mask_inputs`` are those of create_causal_mask."""
        raise NotImplementedError

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Hidden states [B, Q, D] after the final norm; the arguments are those of every causal decoder."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{self.config.model_type}: give exactly one of input_ids and inputs_embeds")
        x_BQD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x_BQD.shape[1], device=x_BQD.device) + num_past).unsqueeze(0)
        inputs = self.attention_inputs(
            x_BQD, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        position_embeddings = self.rotary_emb(x_BQD, position_ids)
        states = []
        for layer, layer_inputs in zip(self.layers, inputs, strict=True):
            states += [x_BQD] if output_hidden_states else []
            x_BQD = layer(
                x_BQD,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **layer_inputs,
                **kwargs,
            )
        x_BQD = self.norm(x_BQD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BQD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x_BQD) if output_hidden_states else None,
        )


class MdsForCausalLMMixin:
    """A language head on ``self.model``; stands before the family's PreTrainedModel."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads it as is)

    def add_head(self, model):
        """Take the model in and build the head."""
        self.model = model
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        """Logits [B, Q, V] (of the last logits_to_keep positions when given) and, with labels, the loss."""
        loss_options = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        output = self.model(input_ids=input_ids, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
