"""Self-attention: projections, optional normalisation of queries and keys, rotary embedding, and a core.

The kinds of attention here differ only in their core: which keys a query sees and how they are weighed. Masks and the
tiled kernel are in ``attention_mask.py`` and ``tiled_attention.py``, attention with other projections in
``latent_attention.py``; docs/attention.md has the formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.model.attention_mask import Packing
from megatron_ds.model.context import Context
from megatron_ds.model.norm import RMSNorm
from megatron_ds.model.rotary import rotate
from megatron_ds.model.tiled_attention import Dropout, tiled_attention
from megatron_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.parallel.random import derive_seed, seed_default_generator
from megatron_ds.parallel.tensor import ALONE, TensorRanks, mark_partial


class Attention(nn.Module):
    """What every kind of attention is built from: x_BSD -> x_BSD. H and G are this rank's heads."""

    def __init__(self, config: ModelConfig, index: int, tensor: TensorRanks = ALONE):
        super().__init__()
        self.config, self.index, self.tensor = config, index, tensor

    def dropout(self, context: Context, use: str = "attention") -> Dropout | None:
        """Dropout on the probabilities, when training; ``use`` tells several in one layer apart.

        Ranks with other heads draw other masks, which are not those of one process.
        """
        if not self.training or self.config.attention_dropout == 0:
            return None
        assert context.dropout_seed is not None, "training with dropout needs a dropout_seed"
        rank = (self.tensor.index,) if self.tensor.size > 1 else ()
        return Dropout(self.config.attention_dropout, derive_seed(context.dropout_seed, self.index, use, *rank))


class SelfAttention(Attention):
    """Queries, keys and values are projections of the input; subclasses say what the core is."""

    def __init__(self, config: ModelConfig, index: int, tensor: TensorRanks = ALONE):
        super().__init__(config, index, tensor)
        width = config.hidden_size
        query_size, key_size = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_kv_heads))
        key_parts = min(config.num_kv_heads, tensor.size)
        self.query = ColumnParallelLinear(width, query_size, tensor, bias=config.add_qkv_bias)
        self.key = ColumnParallelLinear(width, key_size, tensor, key_parts, bias=config.add_qkv_bias)
        self.value = ColumnParallelLinear(width, key_size, tensor, key_parts, bias=config.add_qkv_bias)
        self.output = RowParallelLinear(query_size, width, tensor)
        if config.qk_layernorm:
            self.query_norm = mark_partial(RMSNorm(config.head_dim, config.norm_epsilon))
            self.key_norm = mark_partial(RMSNorm(config.head_dim, config.norm_epsilon))

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        x_BSD, heads = self.tensor.enter(x_BSD), (-1, self.config.head_dim)
        q_BSHK, k_BSGK = self.query(x_BSD).unflatten(-1, heads), self.key(x_BSD).unflatten(-1, heads)
        v_BGSK = self.value(x_BSD).unflatten(-1, heads).transpose(1, 2)
        if self.config.qk_layernorm:
            q_BSHK, k_BSGK = self.query_norm(q_BSHK), self.key_norm(k_BSGK)
        angles = (context.cos_BSK, context.sin_BSK, self.config.rotary_interleaved)
        q_BHSK, k_BGSK = rotate(q_BSHK, *angles), rotate(k_BSGK, *angles)
        core = (q_BHSK, k_BGSK, v_BGSK, x_BSD, context)
        if context.recompute_attention and torch.is_grad_enabled():
            out_BHSK = checkpoint(self.core, *core, use_reentrant=False)
        else:
            out_BHSK = self.core(*core)
        return self.tensor.leave(self.output(out_BHSK.transpose(1, 2).flatten(2)))

    def core(self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, x_BSD: Tensor, context: Context) -> Tensor:
        """out_BHSK from rotated queries and keys, values, and the layer's normalised input, whole."""
        raise NotImplementedError


class GlobalAttention(SelfAttention):
    """Every query sees its whole document."""

    def core(self, q_BHSK, k_BGSK, v_BGSK, x_BSD, context):
        return full_attention(q_BHSK, k_BGSK, v_BGSK, context.packing, self.dropout(context))


class PatternAttention(SelfAttention):
    """Local or global, by the layer's letter in the pattern."""

    def core(self, q_BHSK, k_BGSK, v_BGSK, x_BSD, context):
        pattern, dropout = self.config.attention.pattern, self.dropout(context)
        if pattern[self.index % len(pattern)] == "G":
            return full_attention(q_BHSK, k_BGSK, v_BGSK, context.packing, dropout)
        window = context.window or self.config.attention.window
        return tiled_attention(q_BHSK, k_BGSK, v_BGSK, context.packing, window=window, dropout=dropout)[0]


class GatedAttention(SelfAttention):
    """softmax(score + [d > window] log g) v, where g = sigmoid(far_gate(x)) is learned per token and head."""

    def __init__(self, config: ModelConfig, index: int, tensor: TensorRanks = ALONE):
        super().__init__(config, index, tensor)
        self.far_gate = nn.Linear(config.hidden_size, tensor.share(config.num_attention_heads))
        for parameter in self.far_gate.parameters():
            tensor.shard(parameter, 0)

    def core(self, q_BHSK, k_BGSK, v_BGSK, x_BSD, context):
        gate_BHS = self.far_gate(x_BSD).float().transpose(1, 2)
        implementation = self._by_bias if self.config.attention.implementation == "bias" else self._by_lse
        return implementation(q_BHSK, k_BGSK, v_BGSK, gate_BHS, context)

    def _by_bias(self, q_BHSK, k_BGSK, v_BGSK, gate_BHS, context):
        """One pass over all keys with log g added to the far scores."""
        return tiled_attention(
            q_BHSK, k_BGSK, v_BGSK, context.packing, log_gate_BHS=F.logsigmoid(gate_BHS),
            gate_window=self.config.attention.window, dropout=self.dropout(context),
        )[0]  # fmt: skip

    def _by_lse(self, q_BHSK, k_BGSK, v_BGSK, gate_BHS, context):
        """Mix a local and a full attention by their log-sum-exps: both are plain kernels, and the sum is exact.

        With e^lse the unnormalised mass, g * full + (1 - g) * local counts near keys once and far keys g times.
        """
        qkv, window = (q_BHSK, k_BGSK, v_BGSK, context.packing), self.config.attention.window
        full_BHSK, full_lse_BHS = tiled_attention(*qkv, dropout=self.dropout(context, "full"), with_lse=True)
        local_BHSK, local_lse_BHS = tiled_attention(
            *qkv, window=window, dropout=self.dropout(context, "local"), with_lse=True
        )
        full_share_BHS = torch.sigmoid(gate_BHS + full_lse_BHS - local_lse_BHS)
        return torch.lerp(local_BHSK, full_BHSK, full_share_BHS.unsqueeze(-1).to(q_BHSK.dtype))


def full_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    packing: Packing,
    dropout: Dropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within documents: the library's fused kernels on an accelerator, the tiled one on a CPU.

    Shapes, ``dropout`` and ``scale`` are those of ``tiled_attention``.
    """
    if q_BHSK.is_cpu:
        return tiled_attention(q_BHSK, k_BGSK, v_BGSK, packing, scale=scale, dropout=dropout)[0]
    return fused_attention(q_BHSK, k_BGSK, v_BGSK, packing, dropout, scale)


def fused_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    packing: Packing,
    dropout: Dropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """``full_attention`` by PyTorch's kernel, whose dropout draws from the device's default generator."""
    if dropout:
        seed_default_generator(q_BHSK.device, dropout.seed)
    return F.scaled_dot_product_attention(
        q_BHSK, k_BGSK, v_BGSK,
        attn_mask=None if packing.is_single else packing.visible_B1SS, is_causal=packing.is_single,
        dropout_p=dropout.probability if dropout else 0.0, enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1],
        scale=scale,
    )  # fmt: skip
