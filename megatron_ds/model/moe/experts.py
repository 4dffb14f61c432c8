"""The experts that a rank holds: SwiGLU blocks, computed by grouped matrix products over rows sorted by expert.

The exchange (``exchange.py``) decides what is computed when, so the passes are explicit and not left to autograd:
``forward`` over the rows of one source, ``backward`` for the gradient of these rows, and ``weight_gradients`` over the
rows of all sources at once, which nobody waits for. A row goes to any number of experts here; its outputs come back as
one weighted sum. The weight is applied before the down projection, which is linear, so no unweighted output exists.

``compute`` is the same under plain autograd, without weights: the reference, and what ``all_to_all`` uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.parallel.tensor import ALONE, TensorRanks


class Assignment(NamedTuple):
    """Which experts work on which rows, sorted by expert; entries of one expert are in ascending order of rows."""

    row_A: Tensor
    """int32 or int64: the row of each assignment."""
    weight_A: Tensor
    """fp32: its gate weight."""
    counts: list[int]
    """Assignments of each expert."""


class Saved(NamedTuple):
    """What ``backward`` needs of a forward pass."""

    x_ND: Tensor
    assignment: Assignment
    gate_up_AH: Tensor
    """Both projections, H = 2F."""


class PendingWeights(NamedTuple):
    """What ``weight_gradients`` needs of one backward pass."""

    x_ND: Tensor
    grad_y_ND: Tensor
    row_A: Tensor
    grad_gate_up_AH: Tensor
    activation_AF: Tensor
    """Weighted, as the down projection saw it."""
    counts: list[int]


class Experts(nn.Module):
    """``num_local`` SwiGLU blocks, down(silu(gate(x)) * up(x)); F is this rank's part of their width.

    Attributes:
        gate_up: parameter [E, 2, F, D], gate first; in products it is [E, H, D], gate's rows before up's.
        down: parameter [E, D, F].
    """

    def __init__(
        self,
        num_local: int,
        hidden_size: int,
        ffn_size: int,
        implementation: str = "grouped_mm",
        tensor: TensorRanks = ALONE,
    ):
        """Uninitialised experts.

        Args:
            num_local: how many experts.
            hidden_size: D.
            ffn_size: width of a whole expert.
            implementation: a key of ``PRODUCTS``; grouped products need D and F that are whole 16 bytes.
            tensor: the ranks that share every expert; each returns a term of the outputs' sum.
        """
        super().__init__()
        self.num_experts, width = num_local, ffn_size // tensor.size
        self.gate_up = tensor.shard(nn.Parameter(torch.empty(num_local, 2, width, hidden_size)), 2)
        self.down = tensor.shard(nn.Parameter(torch.empty(num_local, hidden_size, width)), 2)
        self._product = PRODUCTS[implementation]

    def compute(self, x_AD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert -> their outputs, differentiable by autograd."""
        gate_AF, up_AF = self._product.rows(x_AD, self._gate_up_EHD.mT, counts).chunk(2, dim=1)
        return self._product.rows(F.silu(gate_AF) * up_AF, self.down.mT, counts)

    def forward(self, x_ND: Tensor, assignment: Assignment) -> tuple[Tensor, Saved]:
        """y_ND, each row the weighted sum of its experts' outputs (zero without any), and what ``backward`` needs."""
        row_A, weight_A, counts = assignment
        gate_up_AH = self._product.rows(x_ND.index_select(0, row_A), self._gate_up_EHD.mT, counts)
        gate_AF, up_AF = gate_up_AH.chunk(2, dim=1)
        activation_AF = F.silu(gate_AF).mul_(up_AF).mul_(weight_A[:, None])
        y_AD = self._product.rows(activation_AF, self.down.mT, counts)
        return torch.zeros_like(x_ND).index_add_(0, row_A, y_AD), Saved(x_ND, assignment, gate_up_AH)

    def backward(
        self,
        saved: Saved,
        grad_y_ND: Tensor,
        pending: list[PendingWeights],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of the gate weights; those of the experts are left to do, appended to ``pending``.

        Args:
            meanwhile: called when ``pending`` is complete, as in ``exchange.Level``; here there is nothing to wait for.

        Returns:
            grad_x_ND and grad_weight_A (fp32).
        """
        x_ND, (row_A, weight_A, counts), gate_up_AH = saved
        gate_AF, up_AF = gate_up_AH.chunk(2, dim=1)
        grad_AF = self._product.rows(grad_y_ND.index_select(0, row_A), self.down, counts)
        silu_AF = F.silu(gate_AF)
        activation_AF = silu_AF * up_AF
        grad_weight_A = (grad_AF * activation_AF).sum(dim=1, dtype=torch.float32)
        activation_AF.mul_(weight_A[:, None])
        grad_AF.mul_(weight_A[:, None])
        grad_gate_up_AH = torch.empty_like(gate_up_AH)
        grad_gate_AF, grad_up_AF = grad_gate_up_AH.chunk(2, dim=1)
        torch.mul(grad_AF, silu_AF, out=grad_up_AF)
        torch.ops.aten.silu_backward.grad_input(grad_AF.mul_(up_AF), gate_AF, grad_input=grad_gate_AF)
        grad_x_AD = self._product.rows(grad_gate_up_AH, self._gate_up_EHD, counts)
        pending.append(PendingWeights(x_ND, grad_y_ND, row_A, grad_gate_up_AH, activation_AF, counts))
        meanwhile()
        return torch.zeros_like(x_ND).index_add_(0, row_A, grad_x_AD), grad_weight_A

    def weight_gradients(self, pending: Sequence[PendingWeights]) -> tuple[Tensor, Tensor]:
        """Gradients of ``gate_up`` and ``down`` over the rows of all of ``pending``."""
        split = [piece.counts for piece in pending]
        counts = [sum(column) for column in zip(*split)]
        grad_gate_up_AH = _by_expert([piece.grad_gate_up_AH for piece in pending], split)
        x_AD = _gather_by_expert([(piece.x_ND, piece.row_A) for piece in pending], split)
        grad_gate_up_EHD = self._product.outer(grad_gate_up_AH, x_AD, counts)
        del grad_gate_up_AH, x_AD
        grad_y_AD = _gather_by_expert([(piece.grad_y_ND, piece.row_A) for piece in pending], split)
        activation_AF = _by_expert([piece.activation_AF for piece in pending], split)
        return grad_gate_up_EHD.view_as(self.gate_up), self._product.outer(grad_y_AD, activation_AF, counts)

    @property
    def _gate_up_EHD(self) -> Tensor:
        return self.gate_up.flatten(1, 2)


def _by_expert(pieces: list[Tensor], split: list[list[int]]) -> Tensor:
    """Rows of all pieces, each sorted by expert, sorted by expert as a whole."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([part for parts in zip(*(p.split(counts) for p, counts in zip(pieces, split))) for part in parts])


def _gather_by_expert(pieces: list[tuple[Tensor, Tensor]], split: list[list[int]]) -> Tensor:
    """The same for pieces given as rows and indices of them, in one copy."""
    rows = [row_A.split(counts) for (_, row_A), counts in zip(pieces, split)]
    first_ND = pieces[0][0]
    gathered_AD = first_ND.new_empty(sum(map(sum, split)), first_ND.shape[1])
    start = 0
    for parts in zip(*rows):
        for (source_ND, _), row_A in zip(pieces, parts):
            torch.index_select(source_ND, 0, row_A, out=gathered_AD[start : start + len(row_A)])
            start += len(row_A)
    return gathered_AD


@dataclass(frozen=True)
class Product:
    """Products of rows sorted by expert; ``counts`` rows belong to each expert."""

    rows: Callable[[Tensor, Tensor, list[int]], Tensor]
    """(x_AI, weight_EIO, counts) -> [A, O]: every row times the matrix of its expert."""
    outer: Callable[[Tensor, Tensor, list[int]], Tensor]
    """(a_AO, b_AI, counts) -> [E, O, I]: a.T @ b over the rows of each expert."""


def _grouped_rows(x_AI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
    return F.grouped_mm(x_AI, weight_EIO, offs=_ends(counts, x_AI.device))


def _grouped_outer(a_AO: Tensor, b_AI: Tensor, counts: list[int]) -> Tensor:
    return F.grouped_mm(a_AO.t(), b_AI, offs=_ends(counts, a_AO.device))


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _loop_rows(x_AI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
    # unbind: the gradient of weight[e] would be a tensor of all experts, zero but for one.
    return torch.cat([x @ weight for x, weight in zip(x_AI.split(counts), weight_EIO.unbind())])


def _loop_outer(a_AO: Tensor, b_AI: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([a.t() @ b for a, b in zip(a_AO.split(counts), b_AI.split(counts))])


PRODUCTS = {"grouped_mm": Product(_grouped_rows, _grouped_outer), "loop": Product(_loop_rows, _loop_outer)}
"""Keys are the values of ``moe.experts``."""
