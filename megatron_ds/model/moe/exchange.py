"""Tokens on their way to experts that other ranks hold, and their results on the way back, with work in between.

The one idea: ``Level(ring, inner)`` looks like what it is built on. It has experts, and passes ``forward`` and
``backward`` over rows and their assignments, just as ``Experts`` does; but its experts are those of all ranks of a
ring, and it hands on to ``inner`` what belongs there. ``Level(flat, experts)`` is the exchange between all
ranks. ``Level(rails, Level(node, experts))`` is the one between nodes: a token crosses the network once per node, its
counterpart there hands it to its neighbours, and the node's results are summed before they cross back.

A row that several experts of a peer want travels once, with the weights and numbers of these experts behind it, and its
outputs come back as one sum. Only what is needed travels: the counts first, then messages of exactly that size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_ds.model.moe.experts import Assignment, PendingWeights
from megatron_ds.parallel.ring import Ring


class Stage(Protocol):
    """Something with experts: those of this rank (``Experts``), or those of all ranks of a ring (``Level``)."""

    num_experts: int

    def forward(self, x_ND: Tensor, assignment: Assignment) -> tuple[Tensor, Any]:
        """The weighted sum of each row's experts, and what ``backward`` needs."""

    def backward(
        self, saved: Any, grad_y_ND: Tensor, pending: list[PendingWeights], meanwhile: Callable[[], None] = ...
    ) -> tuple[Tensor, Tensor]:
        """Gradients of rows and gate weights; what is left to do for the experts' weights is appended to ``pending``.

        ``meanwhile`` is called when ``pending`` is complete and the last results are on their way.
        """


class Plan(NamedTuple):
    """Who gets what: by peer, in ring order."""

    sent_rows: list[Tensor]
    """The rows of x that go to each peer, ascending."""
    sent_counts: list[list[int]]
    """Assignments to each expert of each peer."""
    received_rows: list[int]
    received_counts: list[list[int]]
    """Assignments from each peer to each expert of this rank."""


class Saved(NamedTuple):
    """What ``Level.backward`` needs of a forward pass."""

    plan: Plan
    inner: dict[int, Any]
    """What the inner stage saved for the rows of each peer."""


class Level:
    """The experts of all ranks of ``ring``, ``inner`` being those of this rank; expert e is at place e // inner's."""

    def __init__(self, ring: Ring, inner: Stage, wire_dtype: torch.dtype | None = None):
        """``wire_dtype``: type of rows on the wire; None leaves them as they are."""
        self.ring, self.inner, self.wire_dtype = ring, inner, wire_dtype
        self.num_experts = ring.size * inner.num_experts

    def forward(self, x_ND: Tensor, assignment: Assignment) -> tuple[Tensor, Saved]:
        """See ``Stage``; collective over the ring, whose ranks may have any number of rows, also none."""
        plan, place_A = self._plan(len(x_ND), assignment)
        trip = _ForwardTrip(self, plan, x_ND, assignment, place_A)
        self.ring.round_trip(trip)
        return trip.y_ND, Saved(plan, trip.saved)

    def backward(
        self,
        saved: Saved,
        grad_y_ND: Tensor,
        pending: list[PendingWeights],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """See ``Stage``."""
        trip = _BackwardTrip(self, saved, grad_y_ND, pending, meanwhile)
        self.ring.round_trip(trip)
        return trip.grad_x_ND, torch.cat(trip.grad_weights)

    def _plan(self, num_rows: int, assignment: Assignment) -> tuple[Plan, Tensor]:
        """The plan, and the place of each assignment's row (int32) in the message that takes it to its peer."""
        size, inner, device = self.ring.size, self.inner.num_experts, assignment.row_A.device
        sent_counts = [assignment.counts[peer * inner : (peer + 1) * inner] for peer in range(size)]
        count_PE = torch.tensor(sent_counts, device=device)
        peer_A = torch.arange(size, device=device).repeat_interleave(count_PE.sum(1), output_size=len(assignment.row_A))
        cell_A = peer_A.mul_(num_rows).add_(assignment.row_A)
        sent_PN = torch.zeros(size, num_rows, dtype=torch.bool, device=device)
        sent_PN.view(-1).index_fill_(0, cell_A, True)
        place_A = sent_PN.cumsum(1, dtype=torch.int32).sub_(1).view(-1).index_select(0, cell_A)
        count_PC = torch.cat((sent_PN.sum(1, keepdim=True), count_PE), dim=1)
        sent, received = torch.stack((count_PC, self.ring.exchange_counts(count_PC))).tolist()
        rows = list(sent_PN.nonzero()[:, 1].split([row[0] for row in sent]))
        return Plan(rows, sent_counts, [row[0] for row in received], [row[1:] for row in received]), place_A


class _Messages:
    """Layout of messages: weights (fp32), places of their rows (int32), rows (of 4-byte types or smaller)."""

    def __init__(self, like_ND: Tensor):
        self._like_ND = like_ND
        self._row_bytes = like_ND.shape[1] * like_ND.element_size()

    def empty(self, rows: int, weights: int = 0, places: int = 0) -> Tensor:
        """Room for a message with so many of each."""
        size = 4 * (weights + places) + rows * self._row_bytes
        return self._like_ND.new_empty(size, dtype=torch.uint8)

    def parts(self, message: Tensor, weights: int = 0, places: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Views of its parts: weight_A, place_A, rows_ND."""
        weight_A, place_A, rows = message.tensor_split((4 * weights, 4 * (weights + places)))
        rows_ND = rows.view(self._like_ND.dtype).view(-1, self._like_ND.shape[1])
        return weight_A.view(torch.float32), place_A.view(torch.int32), rows_ND


class _ForwardTrip:
    """Rows with their weights and experts go out, weighted sums come back."""

    def __init__(self, level: Level, plan: Plan, x_ND: Tensor, assignment: Assignment, place_A: Tensor):
        self._plan, self._ring, self._inner, self._x_ND = plan, level.ring, level.inner, x_ND
        self._wire_ND = x_ND.to(level.wire_dtype or x_ND.dtype)
        self._messages = _Messages(self._wire_ND)
        sizes = [sum(counts) for counts in plan.sent_counts]
        self._row, self._weight = assignment.row_A.split(sizes), assignment.weight_A.split(sizes)
        self._place = place_A.split(sizes)
        self.y_ND = x_ND
        self.saved: dict[int, Any] = {}

    def request(self, peer: int) -> Tensor:
        rows, weight_A = self._plan.sent_rows[peer], self._weight[peer]
        message = self._messages.empty(len(rows), len(weight_A), len(weight_A))
        message_weight_A, message_place_A, message_ND = self._messages.parts(message, len(weight_A), len(weight_A))
        message_weight_A.copy_(weight_A)
        message_place_A.copy_(self._place[peer])
        torch.index_select(self._wire_ND, 0, rows, out=message_ND)
        return message

    def request_buffer(self, peer: int) -> Tensor:
        assignments = sum(self._plan.received_counts[peer])
        return self._messages.empty(self._plan.received_rows[peer], assignments, assignments)

    def serve_own(self) -> None:
        own = self._ring.index
        assignment = Assignment(self._row[own], self._weight[own], self._plan.sent_counts[own])
        self.y_ND, self.saved[own] = self._inner.forward(self._x_ND, assignment)

    def serve(self, peer: int, request: Tensor) -> Tensor:
        counts = self._plan.received_counts[peer]
        weight_A, place_A, wire_ND = self._messages.parts(request, sum(counts), sum(counts))
        x_ND = wire_ND.to(self._x_ND.dtype)
        y_ND, self.saved[peer] = self._inner.forward(x_ND, Assignment(place_A, weight_A, counts))
        return y_ND.to(wire_ND.dtype).view(torch.uint8).flatten()

    def reply_buffer(self, peer: int) -> Tensor:
        return self._messages.empty(len(self._plan.sent_rows[peer]))

    def meanwhile(self) -> None:
        pass

    def collect(self, peer: int, reply: Tensor) -> None:
        _, _, y_ND = self._messages.parts(reply)
        self.y_ND.index_add_(0, self._plan.sent_rows[peer], y_ND.to(self.y_ND.dtype))


class _BackwardTrip:
    """Gradients of the sums go out, gradients of rows and gate weights come back."""

    def __init__(self, level: Level, saved: Saved, grad_y_ND: Tensor, pending: list, meanwhile: Callable[[], None]):
        (self._plan, self._saved), self._ring, self._inner = saved, level.ring, level.inner
        self._grad_y_ND, self._pending, self.meanwhile = grad_y_ND, pending, meanwhile
        self._wire_ND = grad_y_ND.to(level.wire_dtype or grad_y_ND.dtype)
        self._messages = _Messages(self._wire_ND)
        self.grad_x_ND = grad_y_ND
        self.grad_weights: list[Tensor] = [grad_y_ND] * level.ring.size

    def request(self, peer: int) -> Tensor:
        return self._wire_ND.index_select(0, self._plan.sent_rows[peer]).view(torch.uint8).flatten()

    def request_buffer(self, peer: int) -> Tensor:
        return self._messages.empty(self._plan.received_rows[peer])

    def serve_own(self) -> None:
        own = self._ring.index
        self.grad_x_ND, self.grad_weights[own] = self._inner.backward(self._saved[own], self._grad_y_ND, self._pending)

    def serve(self, peer: int, request: Tensor) -> Tensor:
        _, _, wire_ND = self._messages.parts(request)
        grad_y_ND = wire_ND.to(self._grad_y_ND.dtype)
        grad_x_ND, grad_weight_A = self._inner.backward(self._saved[peer], grad_y_ND, self._pending)
        reply = self._messages.empty(len(grad_x_ND), len(grad_weight_A))
        reply_weight_A, _, reply_ND = self._messages.parts(reply, len(grad_weight_A))
        reply_weight_A.copy_(grad_weight_A)
        reply_ND.copy_(grad_x_ND)
        return reply

    def reply_buffer(self, peer: int) -> Tensor:
        return self._messages.empty(len(self._plan.sent_rows[peer]), sum(self._plan.sent_counts[peer]))

    def collect(self, peer: int, reply: Tensor) -> None:
        self.grad_weights[peer], _, grad_x_ND = self._messages.parts(reply, sum(self._plan.sent_counts[peer]))
        self.grad_x_ND.index_add_(0, self._plan.sent_rows[peer], grad_x_ND.to(self.grad_x_ND.dtype))
