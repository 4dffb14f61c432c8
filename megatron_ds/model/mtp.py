"""Multi-token prediction (arXiv 2412.19437, section 2.2): blocks that each predict one token further.

Block k joins what is known of the tokens up to i, the output of the block before it (the first takes the main model's),
with the embedding of token i + k, passes both through a decoder layer, and predicts token i + k + 1 by the model's own
output layer. All predictions stay causal; they train the main model to plan ahead, and can draft tokens later.

In the layer list this is a stretch behind the final norm that leaves everything else as it is: ``next_tokens``, another
use of the embedding, puts the embeddings beside the hidden state; ``MultiTokenPrediction`` turns the depths into rows
of the batch, so that the output layer is one product for all of them. Without the next tokens, that is, outside of
training, both pass the hidden state on. The loss is ``train/objective.py``'s.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.context import Context, seed_dropout
from megatron_ds.model.layer import DecoderLayer
from megatron_ds.model.norm import FinalNorm
from megatron_ds.model.vocabulary import Embedding
from megatron_ds.parallel.linear import Linear
from megatron_ds.parallel.random import dropout
from megatron_ds.parallel.tensor import ALONE, mark_partial

if TYPE_CHECKING:  # importing it starts DeepSpeed, which an export does not need
    from megatron_ds.parallel.groups import Groups


class Losses(NamedTuple):
    """Sums over the counted tokens of a micro-batch, fp32 scalars."""

    main: Tensor
    """-log p of the next token."""
    mtp: Tensor | None
    """-log p of the tokens further ahead, mean over depths; None where the model made no such predictions."""

    def total(self, mtp_weight: float) -> Tensor:
        """What is minimised."""
        return self.main if self.mtp is None else self.main + mtp_weight * self.mtp


def ahead(x_BS: Tensor, distance: int) -> Tensor:
    """What each position finds ``distance`` positions later; zero (False) past the end."""
    return F.pad(x_BS, (0, distance))[:, distance:]


def next_tokens(embedding: Embedding, x_BSD: Tensor, context: Context, *, depths: int) -> Tensor:
    """x_BSD -> [B, S, (1 + depths) * D]: at position i the hidden state, then the embeddings of tokens i + 1, i + 2 ...

    Unchanged if the context has no next tokens. Dropout has masks of its own, not those of the first use.
    """
    if context.next_token_BS is None:
        return x_BSD
    token_NS = torch.cat([ahead(context.next_token_BS, distance) for distance in range(depths)])
    embedded_NSD = embedding.look_up(token_NS, embedding.weight_of_late_uses)
    if embedding.training and embedding.dropout > 0:
        seed_dropout(x_BSD.device, context, "next_tokens")
        embedded_NSD = dropout(embedded_NSD, embedding.dropout, embedding.tensor)
    return torch.cat([x_BSD, *embedded_NSD.split(len(x_BSD))], dim=-1)


class MultiTokenPrediction(nn.ModuleList):
    """What ``next_tokens`` returns -> [(1 + depths) * B, S, D]: the main model's rows, then those of each block.

    x_BSD unchanged if the context has no next tokens.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig | None = None, groups: "Groups | None" = None):
        """``moe`` and ``groups``: see ``decoder.layer_list``."""
        first = config.num_layers
        super().__init__(
            PredictionBlock(config, index, moe, groups) for index in range(first, first + config.mtp_num_layers)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.next_token_BS is None:
            return x
        hidden_BSD, *embedded = x.chunk(1 + len(self), dim=-1)
        rows = [hidden_BSD]
        for block, embedded_BSD in zip(self, embedded, strict=True):
            rows.append(block(rows[-1], embedded_BSD, context))
        return torch.cat(rows)


class PredictionBlock(nn.Module):
    """norm(layer(projection[norm(embedding); norm(hidden)])): x_BSD of the block before -> x_BSD."""

    def __init__(self, config: ModelConfig, index: int, moe: MoEConfig | None, groups: "Groups | None"):
        """``index``: of the decoder layer within, counted on from the last one of the main model."""
        super().__init__()
        tensor = groups.tensor if groups else ALONE
        self.embedding_norm = FinalNorm(config, tensor)
        self.hidden_norm = FinalNorm(config, tensor)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size)
        if tensor.splits_sequence:
            mark_partial(self.projection)
        self.layer = DecoderLayer(config, index, moe, groups)
        self.norm = FinalNorm(config, tensor)

    def forward(self, hidden_BSD: Tensor, embedded_BSD: Tensor, context: Context) -> Tensor:
        joined_BSC = torch.cat(
            [self.embedding_norm(embedded_BSD, context), self.hidden_norm(hidden_BSD, context)], dim=-1
        )
        return self.norm(self.layer(self.projection(joined_BSC), context), context)
