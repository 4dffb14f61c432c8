"""Messages between pipeline neighbours: posted without waiting, awaited when their content is needed.

Messages to later ranks go through one process group and those to earlier ranks through another, so that neither waits
behind the other (gloo is half-duplex per connection; NCCL serialises a communicator). Both carry activations and
gradients: with several chunks per rank either may go either way. Order within a group is the program's order on both
sides (``pipeline/lowering.py``), which is all that pairing needs: there are no tags and no shape messages.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.groups import Groups


class Mailbox:
    """Sends and receives of one rank with its pipeline peers, in both directions."""

    def __init__(self, groups: Groups):
        self._device = groups.device
        self._peers = groups.topology.peers(groups.rank, "pipe")
        self._index = groups.index("pipe")
        self._down, self._up = groups.down, groups.up
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, peer: int) -> None:
        """Post ``tensor`` to pipeline rank ``peer``; it is kept alive until it has left.

        That is seen at the next message, or, with gloo, which says so only to those who wait, in ``drain``.
        """
        tensor = tensor.detach().contiguous()
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        group = self._down if peer > self._index else self._up
        self._sent.append((dist.isend(tensor, self._peers[peer], group=group), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, peer: int) -> "Letter":
        """Post a receive from pipeline rank ``peer``."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        group = self._down if peer < self._index else self._up
        return Letter(dist.irecv(tensor, self._peers[peer], group=group), tensor)

    def drain(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


class Letter:
    """A tensor on its way; ``work`` is None for one that never left the rank."""

    def __init__(self, work: dist.Work | None, tensor: Tensor):
        self._work, self._tensor = work, tensor

    def open(self) -> Tensor:
        """Wait for the content."""
        if self._work is not None:
            self._work.wait()
        return self._tensor
