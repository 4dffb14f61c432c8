"""Run a function on several gloo ranks, in processes that stay warm between tests.

Importing torch and DeepSpeed costs seconds, so each world size keeps its worker processes for the whole test session.
A call sends a picklable function and its arguments to every worker; the workers join a fresh process group on a free
port, run it and send back what it returned. The first failure is raised with the rank's traceback, a worker that dies
or hangs fails the test and the pool is started anew.

    def work(groups, x): ...
    results = run_ranks(work, 4, x, parallel={"pipeline_model_parallel_size": 2})
"""

import atexit
import contextlib
import os
import socket
import time
import traceback

import torch.multiprocessing as multiprocessing

_POOLS: dict[int, "Pool"] = {}


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


class Pool:
    """Worker processes of one world size."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, size, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def call(self, function, arguments, options, timeout):
        """Run on all ranks and return their results in rank order."""
        port = free_port()
        for pipe in self.pipes:
            pipe.send((function, arguments, options, port))
        results = []
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self.pipes):
            while not pipe.poll(0.05):
                if not self.processes[rank].is_alive():
                    raise RankError(f"rank {rank} died with exit code {self.processes[rank].exitcode}")
                if time.monotonic() > deadline:
                    raise RankError(f"rank {rank} did not answer within {timeout} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if not ok:
                raise RankError(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    def kill(self):
        """End the workers."""
        for process in self.processes:
            process.kill()


def run_ranks(function, size, *arguments, parallel=None, timeout=120):
    """``function(groups, *arguments)`` on ``size`` gloo ranks; returns the results in rank order."""
    if size not in _POOLS:
        _POOLS[size] = Pool(size)
    try:
        return _POOLS[size].call(function, arguments, parallel or {}, timeout)
    except BaseException:
        _POOLS.pop(size).kill()
        raise


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank, size, pipe):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    import torch

    from megatron_ds.config.schema import ParallelConfig
    from megatron_ds.parallel.groups import distributed

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, arguments, options, port = pipe.recv()
            os.environ["MASTER_PORT"] = str(port)
            try:
                with distributed(ParallelConfig(**{"distributed_timeout_minutes": 1.0, **options})) as groups:
                    pipe.send((True, function(groups, *arguments)))
            except BaseException:  # noqa: B036 - everything must reach the test
                pipe.send((False, traceback.format_exc()))
                return


@atexit.register
def _stop():
    for pool in _POOLS.values():
        pool.kill()
