"""Process groups: built once from the topology, then handed down to whoever communicates.

Nothing here is global: a component receives a ``Groups``. Device and backend come from DeepSpeed's accelerator, so the
same code runs on gloo and NCCL. Every group gets the run's timeout, also those that DeepSpeed creates later, which
would otherwise wait gloo's 30 minutes for a lost peer.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import ProcessTopology
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from megatron_ds.config.schema import ParallelConfig
from megatron_ds.parallel.ring import Ring
from megatron_ds.parallel.shard import shards_of
from megatron_ds.parallel.tensor import ALONE, TensorRanks
from megatron_ds.parallel.topology import Axis, Topology


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that share this rank's experts, as rings that tokens travel on."""

    flat: Ring
    """All of them, in the order of the experts."""
    rails: Ring | None
    """One per node, those with this rank's place in its node; None unless there are several nodes of several ranks."""
    node: Ring | None
    """Those of this rank's node; None together with ``rails``."""


@dataclass(frozen=True)
class Groups:
    """This rank's place in the world and its process group along each axis."""

    topology: Topology
    rank: int
    device: torch.device
    pipe: dist.ProcessGroup
    data: dist.ProcessGroup
    down: dist.ProcessGroup
    """The pipe ranks again, for messages to later ones: one group per direction keeps the streams apart."""
    up: dist.ProcessGroup
    """The pipe ranks again, for messages to earlier ones."""
    replica: dist.ProcessGroup
    """Data ranks that hold the same experts; all data ranks when experts are not distributed."""
    experts: ExpertGroups | None
    """None when every rank has all experts."""
    tensor: TensorRanks
    """The ranks that share this one's matrices."""
    expert_tensor: TensorRanks
    """The ranks that share the matrices of every expert here: those of ``tensor``, or this one alone."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    def index(self, axis: Axis) -> int:
        """This rank's index along ``axis``."""
        return self.topology.coordinate(self.rank, axis)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.index("pipe") == self.topology.pipe - 1

    def holds_first_copy(self, tensor: Tensor, *, of_data: bool = True) -> bool:
        """Whether this is the first of its stage's ranks that hold the same (part of a) weight.

        Args:
            of_data: also among data ranks; without, only among those with the same data.
        """
        shards = {shard.axis: shard for shard in shards_of(tensor)}
        copy = self.index("tensor") % shards["tensor"].copies if "tensor" in shards else self.index("tensor")
        return copy == 0 and not (of_data and self.index("replica" if "expert" in shards else "data"))

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def sum_over_world(self, tensor: Tensor) -> Tensor:
        """In-place sum over all ranks."""
        dist.all_reduce(tensor)
        return tensor

    def sum_over(self, axis: Axis, tensor: Tensor) -> Tensor:
        """In-place sum over this rank's peers along ``pipe``, ``data``, ``tensor`` or ``replica``."""
        if getattr(self.topology, axis) > 1:
            dist.all_reduce(tensor, group=self.tensor.group if axis == "tensor" else getattr(self, axis))
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0 runs the body while the others wait, then they run it: for work whose result is cached on disk."""
        if self.rank > 0:
            self.barrier()
        try:
            yield
        finally:
            if self.rank == 0:
                self.barrier()

    def tell_deepspeed_about_experts(self) -> None:
        """Put our expert groups where DeepSpeed looks for them: dictionaries that an earlier engine may have filled."""
        dictionaries = (
            (deepspeed_groups._EXPERT_PARALLEL_GROUP, lambda: self.experts.flat.group),
            (deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, lambda: self.topology.peers(self.rank, "expert")),
            (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, lambda: self.replica),
            (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, lambda: self.topology.peers(self.rank, "replica")),
        )
        for dictionary, value in dictionaries:
            dictionary.clear()
            if self.experts is not None:
                dictionary[self.expert_group_name] = value()

    @property
    def expert_group_name(self) -> str:
        """The name under which DeepSpeed knows the expert groups, and the optimizer group of distributed experts."""
        return f"ep_size_{self.topology.expert}"

    def deepspeed_topology(self) -> ProcessTopology:
        """The same grid in DeepSpeed's terms."""
        topology = self.topology
        return ProcessTopology(["pipe", "data", "model"], [topology.pipe, topology.data, topology.tensor])


@contextmanager
def distributed(parallel: ParallelConfig) -> Iterator[Groups]:
    """Join the job that the launcher's environment describes (or a world of one) and leave it at the end.

    Works under ``deepspeed``, ``torchrun`` and plain ``python``.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    dist.distributed_c10d.default_pg_timeout = timeout

    # DeepSpeed would compile a shared-memory kernel for a minute at the first start; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that all use every core slow each other down threefold; and the number of threads shows in the bits.
        torch.set_num_threads(1)
    deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    try:
        yield build_groups(parallel)
    finally:
        dist.destroy_process_group()


def build_groups(parallel: ParallelConfig) -> Groups:
    """Create the groups of every axis; collective over the world, which must be initialised."""
    rank = dist.get_rank()
    topology = Topology.of_world(
        dist.get_world_size(),
        pipe=parallel.pipeline_model_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
    )
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    tensor = TensorRanks(
        index=topology.coordinate(rank, "tensor"),
        size=topology.tensor,
        group=_group_along("tensor", topology, rank),
        sequence_parallel=parallel.sequence_parallel,
    )
    return Groups(
        topology=topology,
        rank=rank,
        device=device if device.type != "cpu" else torch.device("cpu"),
        pipe=_group_along("pipe", topology, rank),
        data=_group_along("data", topology, rank),
        down=_group_along("pipe", topology, rank),
        up=_group_along("pipe", topology, rank),
        replica=_group_along("replica", topology, rank),
        experts=_expert_groups(topology, rank, parallel.expert_ranks_per_node) if topology.expert > 1 else None,
        tensor=tensor,
        expert_tensor=tensor if parallel.expert_tensor_parallel_size > 1 else ALONE,
    )


def _lines(axis: Axis, topology: Topology) -> list[list[int]]:
    """The ranks of every group along ``axis``."""
    starts = [rank for rank in range(topology.world_size) if topology.coordinate(rank, axis) == 0]
    return [topology.peers(start, axis) for start in starts]


def _group_along(axis: Axis, topology: Topology, rank: int) -> dist.ProcessGroup:
    """This rank's group along ``axis``; every rank takes part in creating all of them, in the same order."""
    mine = None
    for peers in _lines(axis, topology):
        group = dist.new_group(peers)
        mine = group if rank in peers else mine
    return mine


def _expert_groups(topology: Topology, rank: int, ranks_per_node: int | None) -> ExpertGroups:
    """The rings of the expert axis; nodes are runs of ``ranks_per_node`` neighbours on it."""
    rings = _lines("expert", topology)
    flat = Ring.build(rings, rank)
    size = ranks_per_node or int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    size //= topology.tensor
    if not 1 < size < topology.expert or topology.expert % size:
        return ExpertGroups(flat, None, None)
    nodes = [ring[first : first + size] for ring in rings for first in range(0, len(ring), size)]
    rails = [ring[place::size] for ring in rings for place in range(size)]
    return ExpertGroups(flat, Ring.build(rails, rank), Ring.build(nodes, rank))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
