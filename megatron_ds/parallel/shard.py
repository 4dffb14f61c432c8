"""How a parameter is cut over ranks, said once, on the parameter.

A layer that builds only its part of a weight tags the parameter; initialisation, gradient norm, checkpoints and
counting read the tag and need to know nothing else about the layer. A parameter without a tag is whole on every rank.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from megatron_ds.parallel.topology import Axis


@dataclass(frozen=True)
class Shard:
    """This rank has part ``index`` of ``count`` equal parts along dimension ``dim``."""

    axis: Axis
    """The axis of the topology whose ranks hold the parts."""
    dim: int
    index: int
    count: int
    copies: int = 1
    """Neighbouring ranks of the axis that hold the same part, each with its share of the part's gradient."""

    def attach(self, parameter: nn.Parameter) -> nn.Parameter:
        """Tag a parameter that holds this part; returns it. One that is cut along several dimensions has several."""
        assert all(shard.dim != self.dim for shard in shards_of(parameter)), f"dimension {self.dim} is cut already"
        parameter.shards = (*shards_of(parameter), self)
        return parameter


def shards_of(tensor: Tensor) -> tuple[Shard, ...]:
    """The tags of a parameter; none when it is whole."""
    return getattr(tensor, "shards", ())


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole weight."""
    shape = list(tensor.shape)
    for shard in shards_of(tensor):
        shape[shard.dim] *= shard.count
    return tuple(shape)


def box_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """The part of the whole weight that a tensor holds: [begin, end) of every dimension."""
    box = [(0, size) for size in tensor.shape]
    for shard in shards_of(tensor):
        size = tensor.shape[shard.dim]
        box[shard.dim] = (shard.index * size, (shard.index + 1) * size)
    return tuple(box)
