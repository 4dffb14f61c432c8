"""Our ``DeepSpeedEngine`` for one pipeline stage: the whole model on every rank, with ZeRO 0-3."""

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import GradientsMixin
from megatron_ds.model.vocabulary import Embedding


class PlainEngine(GradientsMixin, DeepSpeedEngine):
    """Same interface as ``TableEngine``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # ZeRO 2 and 3 reduce while the backward runs; below that we reduce once, after the last micro-batch.
        self._reduces_at_end = self.zero_optimization_stage() < 2
        self.enable_backward_allreduce = not self._reduces_at_end
        self._tied = self._separate_tied_gradients()

    def train_step(self, batches: list[Batch], *, num_counted: int, step: int) -> Tensor:
        """One optimizer step; see ``TableEngine.train_step``."""
        self.module.train()
        scale = self.groups.topology.data / max(num_counted, 1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self.set_gradient_accumulation_boundary(index == len(batches) - 1)
            progress = self.progress(step, index, len(batches))
            logits = self(batch.token_BS, batch.document_BS, batch.position_BS, **progress)
            loss = self.objective(logits, batch)
            total += loss.detach()
            self.backward(loss * scale, scale_wrt_gas=False)
        if self._reduces_at_end:
            self._merge_tied_gradients()
            self.allreduce_gradients()
        self.step()
        self.finish_experts()
        return total

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """float64 loss sum over these batches; changes nothing."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self.objective(self(batch.token_BS, batch.document_BS, batch.position_BS), batch)
        return total

    def _separate_tied_gradients(self) -> Embedding | None:
        """Give a tied output an alias of the embedding's weight, whose gradient adds up by itself.

        A pipeline adds the gradients of both uses over all micro-batches, each on its own stage, before it sums them.
        Floats are not associative: only the same order on one stage gives the same bits. Low precision and ZeRO 2-3,
        which never promise these bits, let autograd sum the two uses per micro-batch and save the second buffer.
        """
        if not self._reduces_at_end or self.fp16_enabled() or self.bfloat16_enabled() or self.module.output is not None:
            return None
        embedding = self.module.embedding
        embedding.output_weight = embedding.weight.detach().requires_grad_()
        return embedding

    def _merge_tied_gradients(self) -> None:
        if self._tied is not None:
            self._tied.weight.grad += self._tied.output_weight.grad
            self._tied.output_weight.grad = None
