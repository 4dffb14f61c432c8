"""Both ends of the model: tokens to vectors, and vectors to scores over the vocabulary.

Either may own its weight, or both share one: then the output multiplies with the embedding's.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.model.context import Context, seed_dropout
from megatron_ds.parallel.linear import Linear, linear


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
        seed_dropout(x_BSD.device, context, "embedding")
        return F.dropout(x_BSD, self.dropout)


class Output(Linear):
    """x_BSD -> logits_BSV over the padded vocabulary, with a weight of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.padded_vocab_size)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        return super().forward(x_BSD)


def tied_output(embedding: Embedding, x_BSD: Tensor, context: Context) -> Tensor:
    """x_BSD -> logits_BSV over the padded vocabulary, with the embedding's weight."""
    return linear(x_BSD, embedding.weight if embedding.output_weight is None else embedding.output_weight)
