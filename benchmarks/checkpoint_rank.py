"""One rank of the checkpoint benchmark: a state as large as a real one, and everybody's way to save and load it.

``checkpoint_parts.py`` starts this file and calls the functions of ``Rank`` by name. Matrices of 1024 x 1024 in fp32,
each with its Adam moments and a running mean, are cut over the ranks as ZeRO cuts them: a rank has an equal part of
each. DeepSpeed's engine cuts its own model of as many bytes: weights, and partitions of masters and moments.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import deepspeed
import network
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_work import DEEPSPEED, KEPT, OURS, PLAIN, TORCH, Turn, files_of, forget, sync
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore
from megatron_ds.checkpoint.tiers import Snapshot, Tier, TieredSaver
from megatron_ds.checkpoint.writing import Content
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.parallel.groups import Groups, distributed
from megatron_ds.parallel.peers import NodePeers

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
SIZE = 1024
"""Rows and columns of a matrix."""
MATRIX_MIB = 4 * len(KINDS)
"""A matrix in fp32 with everything that is kept of it."""
STEP_SECONDS = 0.5
STEP_PRODUCTS = 25
"""Products of two matrices that take about as long on one core."""


class Background(Protocol):
    """Saves beside training."""

    def save(self) -> None:
        """Return as soon as the tensors may change."""
        ...

    def wait(self) -> None:
        """Return when another save may begin."""
        ...


class Tiered:
    """Ours, with the one tier that is durable."""

    def __init__(self, store: CheckpointStore, fragments: list[Fragment]) -> None:
        self._saver, self._fragments = TieredSaver([Tier("durable", store)]), fragments

    def save(self) -> None:
        snapshot = Snapshot(0, self._fragments, Content(rank_state={}, trainer={}, config={}))
        self._saver.save(snapshot, ["durable"])

    def wait(self) -> None:
        self._saver.wait()
        for outcome in self._saver.outcomes():
            if outcome.error:
                raise outcome.error


class AsyncSave:
    """Torch's, which makes a stager, and takes memory, for each save unless it is given one."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor], keep: bool) -> None:
        # Without an accelerator its other options (pinned memory, a copy that does not block) are refused.
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if keep else None
        self._directory, self._tensors, self._future = directory, tensors, None
        self._group = dist.new_group(backend="gloo")

    def save(self) -> None:
        self._future = dcp.async_save(
            self._tensors, checkpoint_id=self._directory, process_group=self._group, async_stager=self._stager
        )

    def wait(self) -> None:
        self._future.result()


class Format(Protocol):
    """A way to files that survive a loss of power, and back into the tensors."""

    def save(self) -> None: ...

    def load(self) -> None: ...


class StoreFormat:
    """Ours: hashed when it is saved and again before it is loaded."""

    def __init__(self, store: CheckpointStore, fragments: list[Fragment]) -> None:
        self._store, self._fragments = store, fragments

    def save(self) -> None:
        self._store.save(0, self._fragments, rank_state={}, trainer={}, config={})

    def load(self) -> None:
        checkpoint = self._store.newest()
        for fragment in self._fragments:
            piece = fragment.piece
            fragment.tensor.copy_(checkpoint.read_range(piece.name, piece.kind, piece.box, piece.start, piece.length))


class TorchFormat:
    """A file per rank."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._path, self._tensors = path, tensors

    def save(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        torch.save(self._tensors, self._path)
        sync(self._path)

    def load(self) -> None:
        for key, tensor in torch.load(self._path).items():
            self._tensors[key].copy_(tensor)


class Matrices(nn.Module):
    """Weights, and a loss that needs all of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(SIZE, SIZE) for _ in range(count))

    def forward(self) -> Tensor:
        return sum(weight.mean() for weight in self.weights)


class DeepSpeedFormat:
    """ZeRO-1 in fp32: rank 0 writes the weights, every rank its partition of masters and moments."""

    def __init__(self, directory: Path, groups: Groups, matrices: int) -> None:
        self._directory, self._groups = directory, groups
        model = Matrices(matrices)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.0, fused=True),
            config={
                "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
            },
        )  # fmt: skip

        self._engine.backward(self._engine())  # the moments are made by the first step
        self._engine.step()

    def save(self) -> None:
        self._engine.save_checkpoint(str(self._directory), tag="last")
        for path in files_of(self._directory)[self._groups.rank :: self._groups.world_size]:
            sync(path)  # which it leaves to the system

    def load(self) -> None:
        assert self._engine.load_checkpoint(str(self._directory), tag="last")[0]


class Rank:
    """The functions that ``checkpoint_parts.py`` calls by name, and what is kept between the calls."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._peers = NodePeers.build()
        self._operands = torch.rand(2, SIZE, SIZE)

    def prepare(self, directory: Path, mib: int) -> None:
        """Make a state of ``mib`` MiB on every rank, and whoever saves it, below a directory."""
        rank, size = self.groups.rank, self.groups.world_size
        matrices, length = mib * size // MATRIX_MIB, SIZE * SIZE // size
        self._fragments = [
            Fragment(f"layers.{number}", kind, (SIZE, SIZE), whole((SIZE, SIZE)), rank * length, torch.rand(length))
            for number in range(matrices)
            for kind in KINDS
        ]
        # Equal names would be taken for copies of one tensor, of which torch writes one.
        tensors = {f"rank{rank}.{part.kind}.{part.name}": part.tensor for part in self._fragments}
        self._folders = {
            name: directory / folder
            for name, folder in zip((OURS, PLAIN, KEPT, TORCH, DEEPSPEED), ("ours", "plain", "kept", "torch", "zero"))
        }
        store = CheckpointStore(self._folders[OURS], self._peers)
        self._background: dict[str, Background] = {
            OURS: Tiered(store, self._fragments),
            PLAIN: AsyncSave(self._folders[PLAIN], tensors, keep=False),
            KEPT: AsyncSave(self._folders[KEPT], tensors, keep=True),
        }
        self._formats: dict[str, Format] = {
            OURS: StoreFormat(store, self._fragments),
            TORCH: TorchFormat(self._folders[TORCH] / f"{rank}.pt", tensors),
            DEEPSPEED: DeepSpeedFormat(self._folders[DEEPSPEED], self.groups, matrices),
        }

    def take_turn(self, name: str, computes: bool, steps: int) -> Turn:
        """A save by ``name``, then steps that compute on this core, or wait as for an accelerator."""
        saver, step = self._background.get(name), self._compute if computes else self._wait
        dist.barrier()
        times = [time.perf_counter()]
        if saver:
            saver.save()
        times.append(time.perf_counter())
        for _ in range(steps):
            step()
        times.append(time.perf_counter())
        if saver:
            saver.wait()
        times.append(time.perf_counter())
        self.remove(name)
        return Turn(*(after - before for before, after in pairwise(times)))

    def save(self, name: str) -> float:
        """Seconds until a checkpoint is durable."""
        return timed(self._formats[name].save)

    def load(self, name: str, cold: bool) -> float:
        """Seconds until the tensors have the values of the checkpoint; ``cold``: none of it is in memory before."""
        dist.barrier()
        if cold and self.groups.rank == 0:
            forget(self._folders[name])
        return timed(self._formats[name].load)

    def size(self, name: str) -> int:
        """Bytes of a checkpoint."""
        return sum(path.stat().st_size for path in files_of(self._folders[name]))

    def remove(self, name: str) -> None:
        """Delete a checkpoint."""
        dist.barrier()
        if self.groups.rank == 0 and name in self._folders:
            shutil.rmtree(self._folders[name], ignore_errors=True)
        dist.barrier()

    def _wait(self) -> None:
        time.sleep(STEP_SECONDS)

    def _compute(self) -> None:
        for _ in range(STEP_PRODUCTS):
            torch.mm(*self._operands)


def timed(work: Callable[[], None]) -> float:
    """Seconds on this rank from a common start."""
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with distributed(ParallelConfig(distributed_timeout_minutes=5.0)) as groups:
        rank = Rank(groups)
        functions = (rank.prepare, rank.take_turn, rank.save, rank.load, rank.size, rank.remove)
        network.serve({function.__name__: function for function in functions})


if __name__ == "__main__":
    main()
