"""What is minimised: logits and a batch in, *sums* of the losses over counted tokens out.

The division by the number of counted tokens happens once, in the engine, with the count of the whole global batch.
Predictions further ahead are divided by the same count, as in the paper (arXiv 2412.19437, section 2.2), although fewer
of their targets are counted.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import Objective
from megatron_ds.model.mtp import Losses, ahead
from megatron_ds.parallel.loss import cross_entropy_sum
from megatron_ds.parallel.tensor import ALONE, TensorRanks


def pretraining(model: ModelConfig, tensor: TensorRanks = ALONE) -> Objective:
    """The objective of ``pretrain.py``; logits are the columns of this one of the ``tensor`` ranks."""
    return partial(predictions, vocab_size=model.vocab_size, tensor=tensor)


def predictions(logits_BSV: Tensor, batch: Batch, *, vocab_size: int, tensor: TensorRanks = ALONE) -> Losses:
    """Losses of the next token and, where the logits have the rows of MTP blocks, of those further ahead.

    The target of block k at position i is the label of position i + k. It is counted if the main model's is there and
    inputs i to i + k belong to one document: the block has seen them all.

    Args:
        logits_BSV: [B, S, V], or [(1 + depths) * B, S, V] with those of the main model first.
        batch: inputs and targets.
        vocab_size: true vocabulary; padded entries have no probability.
        tensor: the ranks that have the columns of the logits.
    """

    def loss(logits_BSV: Tensor, label_BS: Tensor, counted_BS: Tensor) -> Tensor:
        rows = logits_BSV.flatten(0, 1), label_BS.flatten(), counted_BS.flatten()
        return cross_entropy_sum(*rows, vocab_size, tensor)

    batch_size = len(batch.token_BS)
    if len(logits_BSV) == batch_size:
        return Losses(loss(logits_BSV, batch.label_BS, batch.counted_BS), None)
    main_BSV, *further = logits_BSV.split(batch_size)
    sums = []
    for depth, further_BSV in enumerate(further, 1):
        together_BS = batch.document_BS == ahead(batch.document_BS, depth)
        sums.append(loss(further_BSV, ahead(batch.label_BS, depth), ahead(batch.counted_BS, depth) & together_BS))
    return Losses(loss(main_BSV, batch.label_BS, batch.counted_BS), torch.stack(sums).mean())
