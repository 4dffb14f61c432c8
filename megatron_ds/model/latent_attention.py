"""Multi-head latent attention (arXiv 2405.04434, 2.1): keys and values are made from one small vector per token.

A token is compressed to a latent, from which every head makes a key and a value, and (with a latent of their own, or
from the input itself) come the queries. A rotation cannot pass through that up-projection, so positions have channels
of their own: a few in every query head, and as many in one key that all heads share. A decoder need only remember the
latent and that key.

Compression happens between the regions of tensor-parallel ranks (``parallel/tensor.py``), where under sequence
parallelism each has its stretch of the tokens; what enters a region is the latents, and not the much wider x (unless
queries come from it). Inside, each rank makes its own heads. Recompute "selective" keeps no more than what entered and
makes the heads again, which are 39 times as wide in DeepSeek-V3.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.model.attention import Attention, full_attention
from megatron_ds.model.context import Context
from megatron_ds.model.norm import RMSNorm
from megatron_ds.model.rotary import rotate, score_growth
from megatron_ds.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear
from megatron_ds.parallel.tensor import ALONE, TensorRanks, mark_partial

LATENT_EPSILON = 1e-6
"""Of the norms of latents, whatever the model's epsilon is: transformers has no setting for it."""


class LatentSelfAttention(Attention):
    """x_BSD -> x_BSD, or this rank's stretch. A head has plain channels first, then those with a position."""

    def __init__(self, config: ModelConfig, index: int, tensor: TensorRanks = ALONE):
        """``config.attention`` is a ``LatentAttention``."""
        super().__init__(config, index, tensor)
        sizes, width, heads = config.attention, config.hidden_size, config.num_attention_heads
        query_size = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
        key_value_size = heads * (sizes.qk_head_dim + sizes.v_head_dim)
        if sizes.q_lora_rank is None:
            self.query = ColumnParallelLinear(width, query_size, tensor)
        else:
            self.query_down = self._shared(Linear(width, sizes.q_lora_rank))
            self.query_norm = self._shared(RMSNorm(sizes.q_lora_rank, LATENT_EPSILON))
            self.query_up = ColumnParallelLinear(sizes.q_lora_rank, query_size, tensor)
        self.key_value_down = self._shared(Linear(width, sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim))
        self.key_value_norm = self._shared(RMSNorm(sizes.kv_lora_rank, LATENT_EPSILON))
        self.key_value_up = ColumnParallelLinear(sizes.kv_lora_rank, key_value_size, tensor)
        self.output = RowParallelLinear(heads * sizes.v_head_dim, width, tensor)
        self.scale = (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim) ** -0.5 * score_growth(config)

    def _shared(self, module: nn.Module) -> nn.Module:
        """A module that every rank has whole, and uses for its stretch of the tokens."""
        return mark_partial(module) if self.tensor.splits_sequence else module

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        inputs = *self._enter(*self._compress(x_BSD)), context
        if context.recompute_attention and torch.is_grad_enabled():
            out_BSD = checkpoint(self._attend, *inputs, use_reentrant=False)
        else:
            out_BSD = self._attend(*inputs)
        return self.tensor.leave(self.output(out_BSD))

    def _compress(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries are made from, what keys and values are made from, and the key that all heads share."""
        sizes = self.config.attention
        query_BSC = x_BSD if sizes.q_lora_rank is None else self.query_norm(self.query_down(x_BSD))
        latent_BSC, key_BSK = self.key_value_down(x_BSD).split([sizes.kv_lora_rank, sizes.qk_pos_emb_head_dim], dim=-1)
        return query_BSC, self.key_value_norm(latent_BSC), key_BSK

    def _enter(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Into the region, in one message."""
        if self.tensor.size == 1:
            return parts
        return self.tensor.enter(torch.cat(parts, dim=-1)).split([part.shape[-1] for part in parts], dim=-1)

    def _attend(self, query_BSC: Tensor, latent_BSC: Tensor, key_BSK: Tensor, context: Context) -> Tensor:
        """The outputs of this rank's heads side by side, for the output projection."""
        q_BHSK, k_BHSK, v_BHSK = self._heads(query_BSC, latent_BSC, key_BSK, context)
        out_BHSK = full_attention(q_BHSK, k_BHSK, v_BHSK, context.packing, self.dropout(context), self.scale)
        return out_BHSK.transpose(1, 2).flatten(2)

    def _heads(
        self, query_BSC: Tensor, latent_BSC: Tensor, key_BSK: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; those have another width K."""
        sizes = self.config.attention
        plain, rotary, value = sizes.qk_head_dim, sizes.qk_pos_emb_head_dim, sizes.v_head_dim
        query_up = self.query if sizes.q_lora_rank is None else self.query_up
        angles = context.cos_BSK, context.sin_BSK, self.config.rotary_interleaved

        q_BSHK, turned_BSHK = query_up(query_BSC).unflatten(-1, (-1, plain + rotary)).split([plain, rotary], dim=-1)
        q_BHSK = torch.cat([q_BSHK.transpose(1, 2), rotate(turned_BSHK, *angles)], dim=-1)

        k_BSHK, v_BSHK = self.key_value_up(latent_BSC).unflatten(-1, (-1, plain + value)).split([plain, value], dim=-1)
        shared_B1SK = rotate(key_BSK.unsqueeze(2), *angles)
        k_BHSK = torch.cat([k_BSHK.transpose(1, 2), shared_B1SK.expand(-1, k_BSHK.shape[2], -1, -1)], dim=-1)
        return q_BHSK, k_BHSK, v_BSHK.transpose(1, 2)
