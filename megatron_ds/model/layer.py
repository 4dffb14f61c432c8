"""One decoder layer: attention and feed-forward block, each behind a norm and added to the residual stream."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron_ds.config.model_schema import (
    Attention,
    FullAttention,
    HybridAttention,
    LatentAttention,
    ModelConfig,
    SoftGateAttention,
)
from megatron_ds.config.moe_schema import MoEConfig, has_experts
from megatron_ds.model.attention import GatedAttention, GlobalAttention, PatternAttention
from megatron_ds.model.context import Context, seed_dropout
from megatron_ds.model.latent_attention import LatentSelfAttention
from megatron_ds.model.mlp import MLP
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.model.norm import RMSNorm
from megatron_ds.parallel.random import dropout
from megatron_ds.parallel.tensor import ALONE, mark_partial

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups

ATTENTION: dict[type[Attention], type[nn.Module]] = {
    FullAttention: GlobalAttention,
    HybridAttention: PatternAttention,
    SoftGateAttention: GatedAttention,
    LatentAttention: LatentSelfAttention,
}
"""Kind of attention -> its module, built from (config, index of the layer, tensor ranks)."""


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): x_BSD -> x_BSD, or this rank's part of the sequence."""

    def __init__(self, config: ModelConfig, index: int, moe: MoEConfig | None = None, groups: "Groups | None" = None):
        """``moe`` and ``groups``: see ``decoder.layer_list``."""
        super().__init__()
        self.index = index
        self.tensor = groups.tensor if groups else ALONE
        self.dropout = config.hidden_dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = ATTENTION[type(config.attention)](config, index, self.tensor)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = _feed_forward(config, index, moe, groups)
        if self.tensor.splits_sequence:
            mark_partial(self.attention_norm)
            mark_partial(self.mlp_norm)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        attended_BSD = self.attention(self.attention_norm(x_BSD), context)
        if self.training and self.dropout:
            seed_dropout(x_BSD.device, context, self.index)
        x_BSD = self._drop(attended_BSD) + x_BSD
        return self._drop(self.mlp(self.mlp_norm(x_BSD), context)) + x_BSD

    def _drop(self, x_BSD: Tensor) -> Tensor:
        return dropout(x_BSD, self.dropout, self.tensor) if self.training and self.dropout else x_BSD


def _feed_forward(config: ModelConfig, index: int, moe: MoEConfig | None, groups: "Groups | None") -> nn.Module:
    """The dense block of a layer, or its experts; distributed ones in the form that DeepSpeed recognises."""
    if not has_experts(config, moe, index):
        return MLP(config.hidden_size, config.ffn_size, groups.tensor if groups else ALONE)
    if groups is None or groups.experts is None:
        return SparseMLP(config, moe, index, groups)
    from megatron_ds.model.moe.layer import ExpertParallelMLP  # starts DeepSpeed, as Groups do

    return ExpertParallelMLP(config, moe, index, groups)
