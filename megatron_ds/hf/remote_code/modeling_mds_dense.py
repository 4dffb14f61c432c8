"""mds_dense: a Llama-shaped decoder with a soft local/global gate, for stock transformers 5 (trust_remote_code=True).

Attention is softmax(score + [far] * log g). A key is far when it lies local_window or more slots behind its query;
g in (0, 1) is learned per token and head: near 0 the layer sees its window only, at 1 it is full attention. The rest is
Llama's or Qwen3's and stands in modeling_mds_common.py, which also explains the suffixes of names.

The gate is a bias per head and query, so only attention kernels that add a mask of our making can hold it: eager and
sdpa. Flash and flex attention, and engines that substitute their own kernels, are refused rather than left to drop it.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .configuration_mds_dense import MdsDenseConfig
from .modeling_mds_common import MdsAttention, MdsDecoderLayer, MdsForCausalLMMixin, MdsMLP, MdsModelMixin


class MdsDenseAttention(MdsAttention):
    """Grouped-query attention whose scores towards far keys carry log g."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.far_gate = nn.Linear(config.hidden_size, config.num_attention_heads, bias=True)

    def forward(self, x_BQD, causal_B1QC, far_QC, **kwargs):
        gate_BHQ = self.far_gate(x_BQD).to(causal_B1QC.dtype).transpose(1, 2)
        bias_BHQC = causal_B1QC + nn.functional.logsigmoid(gate_BHQ).unsqueeze(-1) * far_QC
        return super().forward(x_BQD, attention_mask=bias_BHQC.to(x_BQD.dtype), **kwargs)


class MdsDenseDecoderLayer(MdsDecoderLayer):
    """A layer with gated attention."""

    def __init__(self, config, layer_idx):
        super().__init__(config, MdsDenseAttention(config, layer_idx), MdsMLP(config, config.intermediate_size))


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


class MdsDenseModel(MdsModelMixin, MdsDensePreTrainedModel):
    """Embedding, decoder layers and final norm."""

    build_layer = MdsDenseDecoderLayer

    def attention_inputs(self, x_BQD, **mask_inputs):
        """The same for every layer: the causal bias, and which cache slots are far from which queries."""
        causal_B1QC = self._causal_bias(x_BQD, **mask_inputs)
        # Distance in cache slots equals distance in positions: padding shifts both ends of it alike.
        past_key_values = mask_inputs["past_key_values"]
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        slot_Q = torch.arange(x_BQD.shape[1], device=x_BQD.device) + num_past
        slot_C = torch.arange(causal_B1QC.shape[-1], device=x_BQD.device)
        far_QC = (slot_Q[:, None] - slot_C >= self.config.local_window).float()
        return [{"causal_B1QC": causal_B1QC, "far_QC": far_QC}] * len(self.layers)

    def _causal_bias(self, x_BQD, **mask_inputs):
        """0 where a key is visible (causal, not padding), the lowest number where it is hidden; fp32 or wider."""
        mask = create_causal_mask(config=self.config, inputs_embeds=x_BQD, allow_is_causal_skip=False, **mask_inputs)
        wide = torch.promote_types(x_BQD.dtype, torch.float32)
        if mask.dtype != torch.bool:
            return mask.to(wide)
        lowest = torch.finfo(x_BQD.dtype).min
        return torch.zeros(mask.shape, dtype=wide, device=mask.device).masked_fill(~mask, lowest)


class MdsDenseForCausalLM(MdsForCausalLMMixin, MdsDensePreTrainedModel, GenerationMixin):
    """The model with its language head."""

    def __init__(self, config):
        super().__init__(config)
        self.add_head(MdsDenseModel(config))


__all__ = ["MdsDenseForCausalLM", "MdsDenseModel", "MdsDensePreTrainedModel"]
