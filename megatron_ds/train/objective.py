"""What is minimised: logits and a batch in, the *sum* of the loss over counted tokens out.

The division by the number of counted tokens happens once, in the engine, with the count of the whole global batch.
"""

from functools import partial

from torch import Tensor

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import Objective
from megatron_ds.parallel.loss import cross_entropy_sum


def next_token(logits_BSV: Tensor, batch: Batch, *, vocab_size: int) -> Tensor:
    """Sum of -log p(label) over the counted positions; padded vocabulary entries have no probability."""
    return cross_entropy_sum(logits_BSV.flatten(0, 1), batch.label_BS.flatten(), batch.counted_BS.flatten(), vocab_size)


def pretraining(model: ModelConfig) -> Objective:
    """The objective of ``pretrain.py``."""
    return partial(next_token, vocab_size=model.vocab_size)
