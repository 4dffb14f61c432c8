"""Peak memory of export-hf and import-hf for a model of a billion weights, each command in a process of its own.

The checkpoint is made here, of random values. The peak is ru_maxrss of the command's process: everything that it ever
had resident, mapped files included. The rate is that of the fp32 weights through the whole command, start and SHA-256
of the checkpoint included. Needs 15 GB of disk below --directory; with 20 GB also a checkpoint with optimizer state.

    python benchmarks/hf_memory.py --check
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import harness
import torch

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess
from megatron_ds.config.schema import RunConfig
from megatron_ds.hf.decoder import tensor_shapes

MODEL = {
    "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32, "num_query_groups": 8,
    "vocab_size": 128_256, "seq_length": 2048,
}  # fmt: skip
"""The shape of Llama 3.2 1B, whose embedding alone takes more than 1 GB in fp32."""
GOAL_GB = 1.5
MOMENTS = ("exp_avg", "exp_avg_sq")
ROOM_FOR_MOMENTS = 20_000_000_000
"""Bytes of free disk for the checkpoint with optimizer state and its export."""


def main(argv: list[str]) -> int:
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--directory", type=Path, help="where to write; by default the directory for temporary files")
    options = parser.parse_args(argv)
    config = RunConfig.model_validate({"megatron_ds": {"model": MODEL, "data": {"eod_id": 0}}})
    shapes = tensor_shapes(config.megatron_ds.model, None)
    size = 4 * sum(map(prod, shapes.values()))
    report = harness.Report(f"Peak memory of export-hf and import-hf, {size / 4e9:.3f} billion weights")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        bench = Bench(report, Path(name), size / 1e9, options.rounds)
        make(bench.work / "weights", config, shapes, kinds=("weight",))
        for precision in ("fp32", "bf16"):
            bench.measure(f"export-hf, {precision}", export_command("weights", precision), output=precision)
            importing = ["import-hf", "--input", precision, "--output", "imported"]
            bench.measure(f"import-hf, {precision}", importing, output="imported")
            shutil.rmtree(bench.work / precision)
            shutil.rmtree(bench.work / "imported")
        shutil.rmtree(bench.work / "weights")
        if shutil.disk_usage(bench.work).free > ROOM_FOR_MOMENTS:
            make(bench.work / "state", config, shapes, kinds=("weight", *MOMENTS))
            bench.measure("export-hf, fp32, of weights and moments", export_command("state", "fp32"), output="fp32")
        else:
            print("too little disk for a checkpoint with optimizer state")
    return report.finish(options)


def export_command(checkpoint: str, precision: str) -> list[str]:
    return ["export-hf", "--load", checkpoint, "--output", precision, "--dtype", precision]


class Bench:
    """Runs commands in ``work`` and adds what they took to the report; ``size_gb`` is that of the fp32 weights."""

    def __init__(self, report: harness.Report, work: Path, size_gb: float, rounds: int) -> None:
        self.report, self.work, self.size_gb, self.rounds = report, work, size_gb, rounds

    def measure(self, name: str, arguments: list[str], output: str) -> None:
        """Run ``megatron-ds ARGUMENTS``, which makes the directory ``output``, once a round."""
        peaks, rates = [], []
        for _ in range(self.rounds):
            shutil.rmtree(self.work / output, ignore_errors=True)
            seconds, peak = self._run(arguments)
            peaks.append(peak / 1e9)
            rates.append(self.size_gb / seconds)
        self.report.add(f"{name}: peak", "GB", peaks, at_most=GOAL_GB)
        self.report.add(f"{name}: rate", "GB/s", rates)

    def _run(self, arguments: list[str]) -> tuple[float, int]:
        """Wall seconds and peak bytes of a command that must succeed."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "megatron_ds.cli.main", *arguments]
        with subprocess.Popen(command, cwd=self.work, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"{command} failed"
        return time.perf_counter() - started, usage.ru_maxrss * 1024


def make(directory: Path, config: RunConfig, shapes: dict[str, tuple[int, ...]], kinds: tuple[str, ...]) -> None:
    """Write a checkpoint in a process of its own, so that its memory is not counted as a child's."""
    process = multiprocessing.get_context("spawn").Process(target=write, args=(directory, config, shapes, kinds))
    process.start()
    process.join()
    assert process.exitcode == 0, "the checkpoint could not be written"


def write(directory: Path, config: RunConfig, shapes: dict[str, tuple[int, ...]], kinds: tuple[str, ...]) -> None:
    """Write random values of every kind for every tensor, as a run of one rank stores them: in one piece each."""

    def fragments() -> Iterator[Fragment]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            for kind in kinds:
                values = torch.empty(prod(shape)).uniform_(-0.05, 0.05, generator=generator)
                yield Fragment(name, kind, shape, whole(shape), 0, values)

    store = CheckpointStore(directory, SingleProcess(), max_file_bytes=1 << 30)
    store.save(1, fragments(), rank_state={}, trainer={"step": 1, "eval": {}}, config=config.model_dump(mode="json"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
