"""mds_dense: a Llama-shaped decoder with a soft local/global gate, for stock transformers 5 (trust_remote_code=True).

Attention is softmax(score + [far] * log g). A key is far when it lies local_window or more slots behind its query;
g in (0, 1) is learned per token and head: near 0 the layer sees its window only, at 1 it is full attention. The rest is
Llama's or Qwen3's: pre-norm, RMSNorm, SwiGLU, grouped keys, half-split rotary embedding, optional query/key norm.

The gate is a bias per head and query, so only attention kernels that add a mask of our making can hold it: eager and
sdpa. Flash and flex attention, and engines that substitute their own kernels, are refused rather than left to drop it.

Two files, imported by transformers or by megatron_ds itself; they may import only torch, transformers and each other.
Suffixes of tensor names: B batch, Q query slots, C cache slots (keys), D model, H heads, G key/value heads, K head dim.
"""

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mds_dense import MdsDenseConfig

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"mds_dense needs transformers 5 or newer; this is {transformers.__version__}")


class MdsDenseRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: normalised in fp32, cast back, then scaled."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MdsDenseRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions.

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
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        return (angle.cos() * self.attention_scaling).to(x.dtype), (angle.sin() * self.attention_scaling).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding in the half-split layout: the pair of channel k is channel k + K/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as it is written on paper; the reference for every other implementation."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weight = query @ key.transpose(2, 3) * scaling + attention_mask
    weight = weight.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weight = nn.functional.dropout(weight, p=dropout, training=module.training)
    return (weight @ value).transpose(1, 2).contiguous(), weight


class MdsDenseAttention(nn.Module):
    """Grouped-query attention whose scores towards far keys carry log g."""

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
        norm = MdsDenseRMSNorm if config.use_qk_norm else lambda width, eps: nn.Identity()
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)
        self.far_gate = nn.Linear(config.hidden_size, config.num_attention_heads, bias=True)

    def forward(self, x_BQD, position_embeddings, causal_B1QC, far_QC, past_key_values=None, **kwargs):
        batch, length, _ = x_BQD.shape
        heads = (batch, length, -1, self.head_dim)
        query_BHQK = rotate(self.q_norm(self.q_proj(x_BQD).view(heads)).transpose(1, 2), *position_embeddings)
        key_BGCK = rotate(self.k_norm(self.k_proj(x_BQD).view(heads)).transpose(1, 2), *position_embeddings)
        value_BGCK = self.v_proj(x_BQD).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key_BGCK, value_BGCK = past_key_values.update(key_BGCK, value_BGCK, self.layer_idx)

        log_gate_BHQ1 = (
            nn.functional.logsigmoid(self.far_gate(x_BQD).to(causal_B1QC.dtype)).transpose(1, 2).unsqueeze(-1)
        )
        bias_BHQC = (causal_B1QC + log_gate_BHQ1 * far_QC).to(x_BQD.dtype)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out_BQHK, weight_BHQC = attend(
            self, query_BHQK, key_BGCK, value_BGCK, bias_BHQC, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out_BQHK.reshape(batch, length, -1)), weight_BHQC


class MdsDenseMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MdsDenseDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward block."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = MdsDenseAttention(config, layer_idx)
        self.mlp = MdsDenseMLP(config)
        self.input_layernorm = MdsDenseRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MdsDenseRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BQD, **kwargs):
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), **kwargs)[0]
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class MdsDensePreTrainedModel(PreTrainedModel):
    """What transformers must know about the family: above all, which attention kernels it may use."""

    config_class = MdsDenseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MdsDenseDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False


class MdsDenseModel(MdsDensePreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MdsDenseDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MdsDenseRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MdsDenseRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

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
            raise ValueError("mds_dense: give exactly one of input_ids and inputs_embeds")
        x_BQD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        slot_Q = torch.arange(x_BQD.shape[1], device=x_BQD.device) + num_past
        if position_ids is None:
            position_ids = slot_Q.unsqueeze(0)

        causal_B1QC = self._causal_bias(x_BQD, attention_mask, past_key_values, position_ids)
        # Distance in cache slots equals distance in positions: padding shifts both ends of it alike.
        slot_C = torch.arange(causal_B1QC.shape[-1], device=x_BQD.device)
        far_QC = (slot_Q[:, None] - slot_C >= self.config.local_window).float()

        position_embeddings = self.rotary_emb(x_BQD, position_ids)
        states = []
        for layer in self.layers:
            states += [x_BQD] if output_hidden_states else []
            x_BQD = layer(
                x_BQD,
                position_embeddings=position_embeddings,
                causal_B1QC=causal_B1QC,
                far_QC=far_QC,
                past_key_values=past_key_values,
                **kwargs,
            )
        x_BQD = self.norm(x_BQD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BQD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x_BQD) if output_hidden_states else None,
        )

    def _causal_bias(self, x_BQD, attention_mask, past_key_values, position_ids):
        """0 where a key is visible (causal, not padding), the lowest number where it is hidden; fp32 or wider."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BQD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        wide = torch.promote_types(x_BQD.dtype, torch.float32)
        if mask.dtype != torch.bool:
            return mask.to(wide)
        lowest = torch.finfo(x_BQD.dtype).min
        return torch.zeros(mask.shape, dtype=wide, device=mask.device).masked_fill(~mask, lowest)


class MdsDenseForCausalLM(MdsDensePreTrainedModel, GenerationMixin):
    """The model with its language head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads it as is)

    def __init__(self, config):
        super().__init__(config)
        self.model = MdsDenseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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


__all__ = ["MdsDenseForCausalLM", "MdsDenseModel", "MdsDensePreTrainedModel"]
