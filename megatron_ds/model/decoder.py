"""The decoder as a flat list of layers: embedding, decoder layers, final norm, output.

Every layer is called as ``layer(x, context)``, so a pipeline stage is a slice of the list and the whole model is the
list itself. ``layer_list`` describes the layers without building them; ``Decoder`` builds all of them in one process,
the pipeline engine builds its own slice from the same entries. Pre-norm, RMSNorm, SwiGLU, rotary positions: the
architecture that Hugging Face calls Llama or Qwen3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import ModelConfig
from megatron_ds.model.attention import ATTENTION
from megatron_ds.model.context import Context
from megatron_ds.model.linear import Linear, linear
from megatron_ds.model.mlp import MLP
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.model.norm import FinalNorm, RMSNorm
from megatron_ds.parallel.random import derive_seed, seed_default_generator

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


class Embedding(nn.Embedding):
    """token_BS -> x_BSD."""

    output_weight: Tensor | None = None
    """What a tied output multiplies with instead of ``weight``: its alias, where gradients of the two uses are kept
    apart until the step (``engine/plain_engine.py``)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.padded_vocab_size, config.hidden_size)
        self.dropout = config.hidden_dropout

    def forward(self, token_BS: Tensor, context: Context) -> Tensor:
        x_BSD = super().forward(token_BS)
        if not self.training or self.dropout == 0:
            return x_BSD
        _seed_dropout(x_BSD.device, context, "embedding")
        return F.dropout(x_BSD, self.dropout)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): x_BSD -> x_BSD."""

    def __init__(self, config: ModelConfig, index: int, moe: MoEConfig | None = None, groups: "Groups | None" = None):
        """``moe`` and ``groups``: see ``layer_list``."""
        super().__init__()
        self.index = index
        self.dropout = config.hidden_dropout
        self.drops = config.hidden_dropout > 0 or config.attention_dropout > 0
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = ATTENTION[type(config.attention)](config, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = _feed_forward(config, index, moe, groups)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        if self.training and self.drops:
            _seed_dropout(x_BSD.device, context, self.index)
        attended_BSD = self.attention(self.attention_norm(x_BSD), context)
        x_BSD = F.dropout(attended_BSD, self.dropout, self.training) + x_BSD
        return F.dropout(self.mlp(self.mlp_norm(x_BSD), context), self.dropout, self.training) + x_BSD


def _feed_forward(config: ModelConfig, index: int, moe: MoEConfig | None, groups: "Groups | None") -> nn.Module:
    """The dense block of a layer, or its experts; distributed ones in the form that DeepSpeed recognises."""
    if moe is None or not moe.is_moe_layer(index):
        return MLP(config.hidden_size, config.ffn_size)
    if groups is None or groups.experts is None:
        return SparseMLP(config, moe, index, groups)
    from megatron_ds.model.moe.layer import ExpertParallelMLP  # starts DeepSpeed, as Groups do

    return ExpertParallelMLP(config, moe, index, groups)


class Output(Linear):
    """x_BSD -> logits_BSV over the padded vocabulary, with a weight of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.padded_vocab_size)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        return super().forward(x_BSD)


def tied_output(embedding: Embedding, x_BSD: Tensor, context: Context) -> Tensor:
    """x_BSD -> logits_BSV over the padded vocabulary, with the embedding's weight."""
    return linear(x_BSD, embedding.weight if embedding.output_weight is None else embedding.output_weight)


def _seed_dropout(device: torch.device, context: Context, layer: int | str) -> None:
    """Seed the generator where a layer starts, so that its masks depend on the layer alone."""
    assert context.dropout_seed is not None, "training with dropout needs a dropout_seed"
    seed_default_generator(device, derive_seed(context.dropout_seed, layer))


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the model, not yet built."""

    name: str
    """Prefix of its parameters' logical names; "output" for the last, tied or not."""
    kind: type[nn.Module]
    arguments: tuple
    """What ``kind`` is built from. A tied output names the embedding: the one that the first layer builds."""
    tied: bool = False
    """Whether the module serves both ends: the first layer as it is, the last through ``tied_output``."""

    def build(self) -> nn.Module:
        """A new module, filled by ``init.initialize``."""
        return self.kind(*self.arguments)


def layer_list(config: ModelConfig, moe: MoEConfig | None = None, groups: "Groups | None" = None) -> list[LayerEntry]:
    """The layers in order: embedding, decoder layers, norm, output.

    Args:
        config: the decoder.
        moe: its experts; None for a dense model.
        groups: ranks that share the experts; None builds all of them here.
    """
    tied = not config.untie_embeddings_and_output_weights
    embedding = LayerEntry("embedding", Embedding, (config,), tied)
    layers = [LayerEntry(f"layers.{i}", DecoderLayer, (config, i, moe, groups)) for i in range(config.num_layers)]
    norm = LayerEntry("norm", FinalNorm, (config.hidden_size, config.norm_epsilon))
    output = replace(embedding, name="output") if tied else LayerEntry("output", Output, (config,))
    return [embedding, *layers, norm, output]


def run(layers: Sequence[Callable], x: Tensor, context: Context, recompute: str | None = None) -> Tensor:
    """Call the layers in order.

    Args:
        layers: the whole model or a pipeline stage, each called as layer(x, context).
        x: token_BS for a list that starts with the embedding, else x_BSD.
        context: what the layers share.
        recompute: "full" keeps only the inputs of decoder layers, "selective" only those of their core attention;
            the rest is computed again in the backward pass, dropout masks included.
    """
    if recompute == "selective":
        context = replace(context, recompute_attention=True)
    for layer in layers:
        if recompute == "full" and isinstance(layer, DecoderLayer) and torch.is_grad_enabled():
            x = checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
        else:
            x = layer(x, context)
    return x


class Decoder(nn.Module):
    """The whole model in one process."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig | None = None,
        *,
        recompute: str | None = None,
        groups: "Groups | None" = None,
    ):
        """``recompute``: see ``run``; ``moe`` and ``groups``: see ``layer_list``.

        Weights are arbitrary until ``init.initialize`` or a checkpoint fills them.
        """
        super().__init__()
        self.config, self.moe, self.recompute = config, moe, recompute
        *entries, output = layer_list(config, moe, groups)
        self.embedding, *layers, self.norm = (entry.build() for entry in entries)
        self.layers = nn.ModuleList(layers)
        self.output = None if output.tied else output.build()

    def forward(
        self,
        token_BS: Tensor,
        document_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
        **progress: Any,
    ) -> Tensor:
        """logits_BSV over the padded vocabulary; by default every row is one document.

        ``progress``: step, dropout_seed and the like, see ``Context.build``.
        """
        if document_BS is None:
            document_BS = torch.zeros_like(token_BS)
        if position_BS is None:
            position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        context = Context.build(self.config, document_BS, position_BS, **progress)
        output = partial(tied_output, self.embedding) if self.output is None else self.output
        return run([self.embedding, *self.layers, self.norm, output], token_BS, context, self.recompute)
