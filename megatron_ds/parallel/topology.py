"""Where each rank sits on the grid: pure arithmetic, no torch and no processes.

Ranks are ordered [pipe][data][tensor] with tensor fastest, so that tensor-parallel peers share a node. A ``Topology``
knows the sizes of the axes and answers for any rank; the process groups made from it are in ``groups.py``.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["pipe", "data", "tensor"]


@dataclass(frozen=True)
class Topology:
    """Sizes of the three axes; ``pipe * data * tensor`` is the world size."""

    pipe: int = 1
    data: int = 1
    tensor: int = 1

    @classmethod
    def of_world(cls, world_size: int, *, pipe: int, tensor: int) -> "Topology":
        """The data axis takes what pipe and tensor leave (the configuration rules made sure that it divides)."""
        assert world_size % (pipe * tensor) == 0, (world_size, pipe, tensor)
        return cls(pipe=pipe, data=world_size // (pipe * tensor), tensor=tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipe * self.data * self.tensor

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Index of ``rank`` along ``axis``."""
        rest, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(rest, self.data)
        return {"pipe": pipe, "data": data, "tensor": tensor}[axis]

    def rank_at(self, *, pipe: int, data: int, tensor: int) -> int:
        """Rank with these coordinates."""
        return (pipe * self.data + data) * self.tensor + tensor

    def peers(self, rank: int, axis: Axis) -> list[int]:
        """Ranks that differ from ``rank`` only along ``axis``, in axis order."""
        here = {name: self.coordinate(rank, name) for name in ("pipe", "data", "tensor")}
        return [self.rank_at(**{**here, axis: index}) for index in range(getattr(self, axis))]

    def describe(self) -> str:
        """One line for people: ``pp 2 x dp 4 x tp 1 = 8 ranks``."""
        return f"pp {self.pipe} x dp {self.data} x tp {self.tensor} = {self.world_size} ranks"
