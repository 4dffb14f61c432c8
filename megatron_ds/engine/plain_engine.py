"""Our ``DeepSpeedEngine`` for ranks that hold the whole model, with ZeRO 0-3."""

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_ds.data.loader import Batch
from megatron_ds.engine.gradients import GradientsMixin


class PlainEngine(GradientsMixin, DeepSpeedEngine):
    """Same interface as ``TableEngine``."""

    computes_loss = True
    """Whether losses that this rank returns count: every data rank has the end of the model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # ZeRO 2 and 3 reduce while the backward runs; below that we reduce once, after the last micro-batch.
        self._reduces_at_end = self.zero_optimization_stage() < 2
        self.enable_backward_allreduce = not self._reduces_at_end
        if self.module.has_late_uses:
            self.separate_late_gradients(self.module.embedding)

    def train_step(
        self, batches: list[Batch], *, num_counted: int, step: int, mtp_weight: float = 0.0, bias_rate: float = 0.0
    ) -> Tensor:
        """One optimizer step; see ``TableEngine.train_step``."""
        self.module.train()
        scale = self.groups.topology.data / max(num_counted, 1)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self.set_gradient_accumulation_boundary(index == len(batches) - 1)
            progress = self.progress(step, index, batches)
            logits = self(batch.token_BS, batch.document_BS, batch.position_BS, **progress)
            losses = self.objective(logits, batch)
            total += self.sums(losses)
            self.backward(losses.total(mtp_weight) * scale, scale_wrt_gas=False)
        if self._reduces_at_end:
            self.complete_gradients()
            self.allreduce_gradients()
        self.step()
        self.finish_experts(bias_rate)
        return total

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """float64 sum of the main loss over these batches; changes nothing."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self.objective(self(batch.token_BS, batch.document_BS, batch.position_BS), batch).main
        return total
