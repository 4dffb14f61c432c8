"""What checkpoints cost: the stall of a save, throughput, and bytes that a change of layout reads.

A. Two processes with 256 MiB of fp32 state each, ours and ``torch.distributed.checkpoint.async_save`` in turn: a save,
   then ten steps. The *stall* is what the training thread loses: the call that saves, and, when the ten steps were not
   enough to write it, the wait until another save could begin. Steps of half a second either wait, as for an
   accelerator, or multiply matrices on the core that the writing thread wants, too: how much slower that makes them is
   listed beside. ``async_save`` runs as it is, with new memory for each copy, and with a stager that is kept, and so
   its memory. Both write and fsync all files in the background; ours also hashes them and publishes by a rename.
B. GB/s of the same state, of the slowest rank. Save: until it is durable, so files that ``torch.save`` and DeepSpeed
   (ZeRO-1, a model whose checkpoint has as many bytes) leave to the system are fsynced within the time. Load: until the
   tensors have their values again, from the disk (cold) and from the page cache. Ours hashes what it writes and what it
   loads; the others do not check.
C. Bytes read from the disk beside bytes needed when the layout changes; ``checkpoint_reshard.py`` says what is counted.

Needs 2 GiB of disk and 5 GiB of memory, takes about five minutes, and means something on a quiet machine only.

    python benchmarks/checkpoint.py --check
"""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

import checkpoint_parts
import checkpoint_reshard
import harness
from network import ended_by_signals

STATE_MIB = 256
"""Per rank."""


def main(argv: list[str]) -> int:
    made = harness.parser(__doc__, rounds=5)
    made.add_argument("--directory", type=Path, help="where to write, by default the system's temporary directory")
    options = made.parse_args(argv)
    versions = f"{STATE_MIB} MiB per rank; deepspeed {importlib.metadata.version('deepspeed')}"
    report = harness.Report(f"Checkpoints: A stall of a save, B throughput, C bytes read by other layouts; {versions}")
    with ended_by_signals(), tempfile.TemporaryDirectory(dir=options.directory) as directory:
        checkpoint_parts.compare(report, Path(directory), options.rounds, STATE_MIB)
        checkpoint_reshard.compare_layouts(report, Path(directory))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
