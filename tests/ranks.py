"""Run a function on several gloo ranks, in processes that stay warm between tests.

Importing torch and DeepSpeed costs seconds, so a server does it once and forks all workers, and each world size keeps
its workers for the whole test session. Between calls they are stopped: their groups have threads that wake up all the
time, and those of all pools together would take a core. A call sends a picklable function and its arguments to every
worker, which makes the groups of its layout unless the last call had the same, runs it and sends back what it returned.
The first failure is raised with the rank's traceback, a worker that dies or hangs fails the test and the pool is
started anew.

    def work(groups, x): ...
    results = run_ranks(work, 4, x, parallel={"pipeline_model_parallel_size": 2})
"""

import atexit
import contextlib
import gc
import os
import secrets
import signal
import socket
import time
import traceback

import torch.multiprocessing as multiprocessing

_POOLS: dict[int, "Pool"] = {}
# With it comes all that ranks import, but for dynamo and inductor, which optimizers and engines import when made.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch._inductor.compile_fx", "megatron_ds.train.build", "megatron_ds.train.self_test"]
)


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


class Pool:
    """Worker processes of one world size."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        self.pipes, self.processes, port = [], [], free_port()
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def call(self, function, arguments, options, timeout):
        """Run on all ranks and return their results in rank order."""
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        answers, deadline = {}, time.monotonic() + timeout
        while len(answers) < len(self.pipes) and time.monotonic() < deadline:
            for rank in set(range(len(self.pipes))) - set(answers):
                answer = self._answer(rank)
                if answer is not None:
                    answers[rank] = answer
                    if not answer[0]:  # the peers of a failed rank fail soon, and one of them may know the cause
                        deadline = min(deadline, time.monotonic() + 2)
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failures:
            cause = min(failures, key=lambda rank: "Connection closed by peer" in failures[rank])
            raise RankError(f"rank {cause}:\n{failures[cause]}")
        if len(answers) < len(self.pipes):
            raise RankError(
                f"no answer within {timeout} s from ranks {sorted(set(range(len(self.pipes))) - set(answers))}"
            )
        self._signal(signal.SIGSTOP)
        return [answers[rank][1] for rank in range(len(self.pipes))]

    def _signal(self, number):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # whoever died is noticed where its answer is missed
                os.kill(process.pid, number)

    def _answer(self, rank):
        """(True, result) or (False, traceback); None while there is no answer."""
        try:
            if self.pipes[rank].poll(0.01):
                return self.pipes[rank].recv()
            if self.processes[rank].is_alive():
                return None
        except EOFError:
            pass
        self.processes[rank].join(5)
        return False, f"died with exit code {self.processes[rank].exitcode}"

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
    """A TCP port that is free now and outside of the range from which sockets get theirs unasked."""
    while True:
        port = 12000 + secrets.randbelow(16000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _worker(rank, size, port, pipe):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    from megatron_ds.config.schema import ParallelConfig
    from megatron_ds.parallel.groups import Groups, build_groups, distributed

    gc.freeze()  # modules live as long as the worker: ``_drop_groups`` need not go through their objects
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = str(port)
    held: tuple[ParallelConfig, Groups] | None = None
    with contextlib.suppress(EOFError, KeyboardInterrupt), distributed(ParallelConfig(distributed_timeout_minutes=1.0)):
        world = set(dist.distributed_c10d._world.pg_map)
        while True:
            function, arguments, options = pipe.recv()
            try:
                layout = ParallelConfig(**options)
                if held is None or held[0] != layout:
                    held = None
                    _drop_groups(world)
                    held = (layout, build_groups(layout))
                before = set(dist.distributed_c10d._world.pg_map)
                pipe.send((True, function(held[1], *arguments)))
                _drop_groups(before)
            except BaseException:
                pipe.send((False, traceback.format_exc()))
                return


def _drop_groups(before):
    """Destroy the groups of a test's engines: each has threads that wake up a hundred times a second.

    Engines outlive a test, since their hooks on parameters refer to them from C++ where no collector looks. So what
    could hold a group is emptied.
    """
    import torch.distributed as dist
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid
    from deepspeed.utils import groups as deepspeed_groups

    holders = (DeepSpeedEngine, DeepSpeedOptimizer, PipelineParallelGrid)
    for thing in gc.get_objects():
        if issubclass(type(thing), holders):
            vars(thing).clear()
    kept = [value for value in vars(deepspeed_groups).values() if isinstance(value, dist.ProcessGroup)]
    for group in set(dist.distributed_c10d._world.pg_map) - before:
        if group not in kept:
            dist.destroy_process_group(group)
    gc.collect()


@atexit.register
def _stop():
    for pool in _POOLS.values():
        pool.kill()
