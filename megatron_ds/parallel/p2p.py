"""Messages between pipeline neighbours: posted without waiting, awaited when their content is needed.

Activations go downstream in one process group and gradients upstream in another, so neither waits behind the other
(gloo is half-duplex per connection; NCCL serialises a communicator). Order within a group is the program's order on
both sides (``pipeline/lowering.py``), which is all that pairing needs: there are no tags and no shape messages.
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
        self._groups = {"activation": groups.activations, "gradient": groups.gradients}
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, stream: str, tensor: Tensor, peer: int) -> None:
        """Post ``tensor`` to pipeline rank ``peer``; it is kept alive until ``drain``."""
        tensor = tensor.detach().contiguous()
        self._sent.append((dist.isend(tensor, self._peers[peer], group=self._groups[stream]), tensor))

    def receive(self, stream: str, shape: tuple[int, ...], dtype: torch.dtype, peer: int) -> "Letter":
        """Post a receive from pipeline rank ``peer``."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return Letter(dist.irecv(tensor, self._peers[peer], group=self._groups[stream]), tensor)

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
