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

    def attach(self, parameter: nn.Parameter) -> nn.Parameter:
        """Tag a parameter that holds this part; returns it."""
        parameter.shard = self
        return parameter


def shard_of(tensor: Tensor) -> Shard | None:
    """The tag of a parameter; None when it is whole."""
    return getattr(tensor, "shard", None)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole weight."""
    shape, shard = list(tensor.shape), shard_of(tensor)
    if shard is not None:
        shape[shard.dim] *= shard.count
    return tuple(shape)


def box_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """The part of the whole weight that a tensor holds: [begin, end) of every dimension."""
    box, shard = [(0, size) for size in tensor.shape], shard_of(tensor)
    if shard is not None:
        size = tensor.shape[shard.dim]
        box[shard.dim] = (shard.index * size, (shard.index + 1) * size)
    return tuple(box)
