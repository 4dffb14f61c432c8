"""The decoder as a flat list of layers: embedding, decoder layers, final norm, blocks of further prediction, output.

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
from megatron_ds.model.mtp import MultiTokenPrediction, next_tokens
from megatron_ds.model.norm import FinalNorm
from megatron_ds.model.vocabulary import Embedding, Output, tied_output
from megatron_ds.parallel.tensor import ALONE

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the model, not yet built."""

    name: str
    """Prefix of its parameters' logical names; that of a late use of the embedding prefixes none."""
    kind: type[nn.Module]
    arguments: tuple
    """What ``kind`` is built from; that of a late use names the embedding, the one that the first layer builds."""
    tied: bool = False
    """Whether the module is an embedding that layers at the end of the model use, too."""
    call: Callable[[Any, Tensor, Context], Tensor] | None = None
    """How such a layer uses it: ``call(embedding, x, context)``; None: the layer is the module itself."""

    def build(self) -> nn.Module:
        """A new module, filled by ``init.initialize``."""
        return self.kind(*self.arguments)


def layer_list(config: ModelConfig, moe: MoEConfig | None = None, groups: "Groups | None" = None) -> list[LayerEntry]:
    """The layers in order: embedding, decoder layers, norm, with MTP next tokens and its blocks, output.

    Args:
        config: the decoder.
        moe: its experts; None for a dense model.
        groups: ranks that share the layers and the experts; None builds all of them here.
    """
    tensor = groups.tensor if groups else ALONE
    tied_end = not config.untie_embeddings_and_output_weights
    embedding = LayerEntry("embedding", Embedding, (config, tensor), tied=tied_end or config.mtp_num_layers > 0)
    entries = [LayerEntry(f"layers.{i}", DecoderLayer, (config, i, moe, groups)) for i in range(config.num_layers)]
    entries.append(LayerEntry("norm", FinalNorm, (config, tensor)))
    if config.mtp_num_layers:
        call = partial(next_tokens, depths=config.mtp_num_layers)
        entries.append(replace(embedding, name="next_tokens", call=call))
        entries.append(LayerEntry("mtp", MultiTokenPrediction, (config, moe, groups)))
    if tied_end:
        entries.append(replace(embedding, name="output", call=tied_output))
    else:
        entries.append(LayerEntry("output", Output, (config, tensor)))
    return [embedding, *entries]


RECOMPUTED = (DecoderLayer, MultiTokenPrediction)
"""Layers that full recompute runs again."""


def run(layers: Sequence[Callable], x: Tensor, context: Context, recompute: str | None = None) -> Tensor:
    """Call the layers in order.

    Args:
        layers: the whole model or a pipeline stage, each called as layer(x, context).
        x: token_BS for a list that starts with the embedding, else x_BSD.
        context: what the layers share.
        recompute: "full" keeps only the inputs of decoder layers (and of the MTP blocks together), "selective" only
            those of their core attention; the rest is computed again in the backward pass, dropout masks included.
    """
    if recompute == "selective":
        context = replace(context, recompute_attention=True)
    for layer in layers:
        if recompute == "full" and isinstance(layer, RECOMPUTED) and torch.is_grad_enabled():
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
        self.entries = layer_list(config, moe, groups)
        self.embedding, self.layers = self.entries[0].build(), nn.ModuleList()
        for entry in self.entries[1:]:
            if entry.call is None:
                parent, _, name = entry.name.rpartition(".")
                self.get_submodule(parent).add_module(name, entry.build())

    @property
    def has_late_uses(self) -> bool:
        """Whether layers at the end of the model use the embedding, too."""
        return self.entries[0].tied

    def forward(
        self,
        token_BS: Tensor,
        document_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
        **progress: Any,
    ) -> Tensor:
        """logits_BSV over (this tensor rank's part of) the padded vocabulary; by default every row is one document.

        ``progress``: step, dropout_seed and the like, see ``Context.build``. With ``next_token_BS`` a model with MTP
        returns [(1 + depths) * B, S, V]: below the main model's rows those of its blocks, see ``mtp.py``.
        """
        if document_BS is None:
            document_BS = torch.zeros_like(token_BS)
        if position_BS is None:
            position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        context = Context.build(self.config, document_BS, position_BS, **progress)
        layers = [
            self.get_submodule(entry.name) if entry.call is None else partial(entry.call, self.embedding)
            for entry in self.entries
        ]
        return run(layers, token_BS, context, self.recompute)
