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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.context import Context
from megatron_ds.model.layer import DecoderLayer
from megatron_ds.model.norm import FinalNorm
from megatron_ds.model.vocabulary import Embedding, Output, tied_output

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


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
    norm = LayerEntry("norm", FinalNorm, (config,))
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
