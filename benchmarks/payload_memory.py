"""A network that carries sizes and counts but no rows, for telling what a layer does from what it waits for.

``PayloadMemory.recorded`` keeps what a pass receives; under ``replayed`` the same pass gets it from memory, where it
would have sent and received: the code, the order of its work and its results stay the same, and no payload travels.
Received bytes are copied into place, as the kernel does from a socket. Integers of four bytes and more are sizes and
counts and travel as always.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


class PayloadMemory:
    """What one pass of one layer received on this rank, in the order in which it asked for it."""

    def __init__(self) -> None:
        self._received: list[Tensor | None] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Transfer as always and remember what comes."""
        self._received.clear()
        real_all_to_all, real_batch = dist.all_to_all_single, dist.batch_isend_irecv

        def all_to_all_single(output: Tensor, input: Tensor, *rest, **options):
            work = real_all_to_all(output, input, *rest, **options)
            if _is_payload(output):
                self._received.append(output.clone())
            return work

        def batch_isend_irecv(operations: list[dist.P2POp]) -> list:
            works = real_batch(operations)
            return [self._recording(*pair) for pair in zip(operations, works, strict=True)]

        with mock.patch.multiple(dist, all_to_all_single=all_to_all_single, batch_isend_irecv=batch_isend_irecv):
            yield

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Send nothing and receive from memory."""
        received = iter(self._received)
        real_all_to_all = dist.all_to_all_single

        def all_to_all_single(output: Tensor, input: Tensor, *rest, **options):
            if not _is_payload(output):
                return real_all_to_all(output, input, *rest, **options)
            output.copy_(next(received))
            return None

        def batch_isend_irecv(operations: list[dist.P2POp]) -> list:
            for operation in operations:
                if operation.op is dist.irecv:
                    operation.tensor.copy_(next(received))
            return []

        with mock.patch.multiple(dist, all_to_all_single=all_to_all_single, batch_isend_irecv=batch_isend_irecv):
            yield
        assert next(received, None) is None, "the pass received less than the one that was recorded"

    def _recording(self, operation: dist.P2POp, work: dist.Work) -> "dist.Work | _Recording":
        if operation.op is not dist.irecv:
            return work
        self._received.append(None)
        return _Recording(self._received, operation.tensor, work)


class _Recording:
    """A receive that puts a copy of what came into its place in the memory."""

    def __init__(self, received: list[Tensor | None], buffer: Tensor, work: dist.Work) -> None:
        self._received, self._place, self._buffer, self._work = received, len(received) - 1, buffer, work

    def wait(self) -> bool:
        finished = self._work.wait()
        self._received[self._place] = self._buffer.clone()
        return finished


def _is_payload(tensor: Tensor) -> bool:
    return tensor.dtype not in (torch.int32, torch.int64)
