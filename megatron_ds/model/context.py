"""What all layers of one micro-batch share: documents, rotary tables, the window of this step, the dropout seed.

It is computed once per micro-batch (and pipeline stage) and handed to every layer, so layers keep no state between
calls and need no buffers of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.config.model_schema import Attention, HybridAttention, ModelConfig
from megatron_ds.model.attention_mask import Packing
from megatron_ds.model.rotary import rotary_tables
from megatron_ds.parallel.random import derive_seed, seed_default_generator


@dataclass(frozen=True)
class Context:
    """Everything a layer needs beside its input."""

    packing: Packing
    """Which tokens belong together."""
    cos_BSK: Tensor
    """fp32 rotary tables, [B, S, K/2]."""
    sin_BSK: Tensor
    window: int | None
    """Width of local layers at this step; None: the configured one."""
    dropout_seed: int | None
    """Identifies this micro-batch's dropout masks and router noise; None where there are none."""
    micro_batch: int = 0
    """Index of this micro-batch within the step on this rank."""
    auxiliary_scale: float = 1.0
    """Factor on the gradient of auxiliary losses, which enter the graph where they arise."""
    recompute_attention: bool = False
    """Run the core attention again in the backward pass instead of keeping what it computed."""
    next_token_BS: Tensor | None = None
    """int64: the token that follows each input, for multi-token prediction; None: the model predicts one token."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        document_BS: Tensor,
        position_BS: Tensor,
        *,
        step: int | None = None,
        dropout_seed: int | None = None,
        micro_batch: int = 0,
        auxiliary_scale: float = 1.0,
        next_token_BS: Tensor | None = None,
    ) -> "Context":
        """The context of one micro-batch.

        Args:
            config: the model.
            document_BS: int64; a document is a run of equal ids, and documents do not see each other.
            position_BS: int64 rotary positions, normally restarting at 0 with each document.
            step: optimizer step, for a growing window; None takes the final width.
            dropout_seed: needed when training with dropout, see ``parallel.random.micro_batch_seed``.
            micro_batch: number of this micro-batch within the step.
            auxiliary_scale: loss scale over the number of micro-batches, see ``model.moe.balance.attach_loss``.
            next_token_BS: int64, the token that follows each input; given in training with multi-token prediction.
        """
        window = None if step is None else window_at(config.attention, step)
        return cls(
            Packing(document_BS),
            *rotary_tables(config, position_BS),
            window=window,
            dropout_seed=dropout_seed,
            micro_batch=micro_batch,
            auxiliary_scale=auxiliary_scale,
            next_token_BS=next_token_BS,
        )


def window_at(attention: Attention, step: int) -> int | None:
    """Width of local layers at an optimizer step: linear growth to the configured one, or None if it does not grow."""
    if not isinstance(attention, HybridAttention) or attention.window_growth is None:
        return None
    growth = attention.window_growth
    grown = min(step / growth.iters, 1.0)
    return round(growth.start + (attention.window - growth.start) * grown)


def seed_dropout(device: torch.device, context: Context, layer: int | str) -> None:
    """Seed the generator where a layer starts, so that its masks depend on the layer alone."""
    assert context.dropout_seed is not None, "training with dropout needs a dropout_seed"
    seed_default_generator(device, derive_seed(context.dropout_seed, layer))
