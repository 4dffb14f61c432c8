"""Where each rank sits on the grid: pure arithmetic, no torch and no processes.

Ranks are ordered [pipe][data][tensor] with tensor fastest, so that tensor-parallel peers share a node. A ``Topology``
knows the sizes of the axes and answers for any rank; the process groups made from it are in ``groups.py``.

Expert parallelism folds into the data axis: ``expert`` neighbouring data ranks share the experts of a layer, and the
data ranks that hold the same experts are each other's replicas.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["pipe", "data", "tensor", "expert", "replica"]


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes; ``pipe * data * tensor`` is the world size, and ``expert`` divides ``data``."""

    pipe: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1

    @classmethod
    def of_world(cls, world_size: int, *, pipe: int, tensor: int, expert: int = 1) -> "Topology":
        """The data axis takes what pipe and tensor leave (the configuration rules made sure that it divides)."""
        assert world_size % (pipe * tensor * expert) == 0, (world_size, pipe, tensor, expert)
        return cls(pipe=pipe, data=world_size // (pipe * tensor), tensor=tensor, expert=expert)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipe * self.data * self.tensor

    @property
    def replica(self) -> int:
        """Number of data ranks that hold the same experts."""
        return self.data // self.expert

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Index of ``rank`` along ``axis``."""
        rest, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(rest, self.data)
        replica, expert = divmod(data, self.expert)
        return {"pipe": pipe, "data": data, "tensor": tensor, "expert": expert, "replica": replica}[axis]

    def rank_at(self, *, pipe: int, data: int, tensor: int) -> int:
        """Rank with these coordinates."""
        return (pipe * self.data + data) * self.tensor + tensor

    def peers(self, rank: int, axis: Axis) -> list[int]:
        """Ranks that differ from ``rank`` only along ``axis``, in axis order."""
        here = {name: self.coordinate(rank, name) for name in ("pipe", "data", "tensor")}
        if axis in ("expert", "replica"):
            expert, replica = self.coordinate(rank, "expert"), self.coordinate(rank, "replica")
            along = {
                "expert": range(replica * self.expert, (replica + 1) * self.expert),
                "replica": range(expert, self.data, self.expert),
            }[axis]
            return [self.rank_at(**{**here, "data": data}) for data in along]
        return [self.rank_at(**{**here, axis: index}) for index in range(getattr(self, axis))]

    def describe(self) -> str:
        """One line for people: ``pp 2 x dp 4 x tp 1 = 8 ranks``."""
        experts = f" (ep {self.expert})" if self.expert > 1 else ""
        return f"pp {self.pipe} x dp {self.data}{experts} x tp {self.tensor} = {self.world_size} ranks"
