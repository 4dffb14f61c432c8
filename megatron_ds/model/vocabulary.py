"""Both ends of the model: tokens to vectors, and vectors to scores over the vocabulary.

Either may own its weight, or both share one: then the output multiplies with the embedding's. Tensor-parallel ranks
have equal runs of the padded vocabulary: a rank looks up its own tokens, and scores its own.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.model.context import Context, seed_dropout
from megatron_ds.parallel.linear import ColumnParallelLinear, linear
from megatron_ds.parallel.random import dropout
from megatron_ds.parallel.tensor import ALONE, TensorRanks


class Embedding(nn.Embedding):
    """token_BS -> x_BSD."""

    late_weight: Tensor | None = None
    """What uses at the end of the model take instead of ``weight``: its alias, where gradients of early and late uses
    are kept apart until the step (``engine/gradients.py``)."""

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE):
        super().__init__(tensor.share(config.padded_vocab_size), config.hidden_size)
        tensor.shard(self.weight, 0)
        self.tensor, self.dropout = tensor, config.hidden_dropout

    def forward(self, token_BS: Tensor, context: Context) -> Tensor:
        x_BSD = self.look_up(token_BS, self.weight)
        if not self.training or self.dropout == 0:
            return x_BSD
        seed_dropout(x_BSD.device, context, "embedding")
        return dropout(x_BSD, self.dropout, self.tensor)

    def look_up(self, token_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of the whole vocabulary, of which ``weight_VD`` is this rank's part: x_BSD without dropout."""
        if self.tensor.size == 1:
            return F.embedding(token_BS, weight_VD)
        row_BS = token_BS - self.tensor.index * len(weight_VD)
        foreign_BS = (row_BS < 0) | (row_BS >= len(weight_VD))
        x_BSD = F.embedding(row_BS.masked_fill(foreign_BS, 0), weight_VD)
        return self.tensor.leave(x_BSD.masked_fill(foreign_BS.unsqueeze(-1), 0.0))

    @property
    def weight_of_late_uses(self) -> Tensor:
        """``weight``, or its alias."""
        return self.weight if self.late_weight is None else self.late_weight


class Output(ColumnParallelLinear):
    """x_BSD -> logits_BSV over this rank's part of the padded vocabulary, with a weight of its own."""

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE):
        super().__init__(config.hidden_size, config.padded_vocab_size, tensor)
        self.tensor = tensor

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        return super().forward(self.tensor.enter(x_BSD))


def tied_output(embedding: Embedding, x_BSD: Tensor, context: Context) -> Tensor:
    """x_BSD -> logits_BSV over this rank's part of the padded vocabulary, with the embedding's weight."""
    weight_VD = embedding.weight_of_late_uses
    if context.next_token_BS is not None:
        # Its other late use (``mtp.next_tokens``) cannot wait: as a view, neither can this one's weight gradient. So
        # both are added in one order, and to the same bits, whatever the schedule.
        weight_VD = weight_VD.view_as(weight_VD)
    return linear(embedding.tensor.enter(x_BSD), weight_VD)
