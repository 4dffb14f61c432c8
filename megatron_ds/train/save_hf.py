"""Exports to Hugging Face as a run goes on: ``hf/global_step{N}`` beside the checkpoints.

Each is made by a process of its own, from the checkpoint that has just been committed. So an export never draws from
the run's random generators, holds its interpreter's lock or takes its memory; it runs at low priority, and whatever
happens to it is one line here. It ends with the run: what it leaves then, the next one removes. A small model is also
verified. How an export is written is told in ``hf/export.py``.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from megatron_ds.checkpoint.reader import TRAINER
from megatron_ds.checkpoint.retention import validation_loss
from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.checkpoint.writing import discard, remove
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError, ConfigError, run_main
from megatron_ds.hf.decoder import read_config
from megatron_ds.hf.export import export, mtp_directory
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.report import REPORT
from megatron_ds.hf.targets import choose_target
from megatron_ds.model.cost import num_parameters

MAX_VERIFIED_PARAMETERS = 500_000_000
"""Larger models are exported without the proof, which builds the model twice in fp32."""
NICENESS = 10
"""How much the exporting process stands back."""
EXPORT = re.compile(r"global_step\d+(-mtp)?")
LAUNCHER = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE|CROSS)_)?(RANK|WORLD_SIZE)|(LOCAL|CROSS)_SIZE|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|OMPI|PMIX?)_.*"
)
"""Environment variables that make a process a rank."""


def check_expressible(config: RunConfig) -> None:
    """Raise ConfigError, with the reasons, when exports are asked for and no target can express the model."""
    ours = config.megatron_ds
    if ours.checkpoint.save_hf is None:
        return
    try:
        choose_target(ours.model, ours.moe)
    except ConfigError as error:
        reasons = str(error).removeprefix("--target auto: ")
        raise ConfigError(f"checkpoint.save_hf = {ours.checkpoint.save_hf}: {reasons}; leave it out") from error


class HuggingFaceSaver:
    """Exports the checkpoints of ``directory`` to its folder hf/: the newest, the best by validation, or every one."""

    def __init__(self, directory: Path, when: Literal["last", "best", "every"]) -> None:
        self.directory = Path(directory) / "hf"
        self.when = when

    def after_save(self, checkpoint: Path) -> list[str]:
        """Export a checkpoint that has just been committed, if it is due; lines for the user.

        On rank 0 alone, on a thread in the background. What is no longer wanted goes when the new export is whole.
        Raises CheckpointError or ConfigError, in one line, when it could not be made: earlier exports are as they were.
        """
        try:
            for leftover in (*self.directory.glob(".global_step*"), *self.directory.glob("global_step*.tmp")):
                remove(leftover)
            if self.when == "best":
                loss = validation_loss(json.loads((checkpoint / TRAINER).read_bytes()))
                if loss is None:
                    return [f"{checkpoint.name} is not exported: it has no validation loss that could be the best"]
                if not loss < min(map(_exported_loss, self._exports()), default=math.inf):
                    return []
            output = self.directory / checkpoint.name
            export_apart(checkpoint, output)
            if self.when != "every":
                self._keep_only(output)
            return [_message(output)]
        except OSError as error:
            raise CheckpointError(f"exporting {checkpoint} to {self.directory} failed: {error}") from error

    def _exports(self) -> list[Path]:
        return [path for path in self.directory.glob("global_step*") if EXPORT.fullmatch(path.name)]

    def _keep_only(self, output: Path) -> None:
        """Remove all other exports."""
        for path in self._exports():
            if path not in (output, mtp_directory(output)):
                discard(path)


def export_apart(checkpoint: Path, output: Path) -> None:
    """Export a step directory in a fresh process that ends, at the latest, with this one.

    Raises ConfigError or CheckpointError with that process's own reason.
    """
    environment = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the devices are the run's
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-P", "-m", "megatron_ds.train.save_hf", str(checkpoint), str(output)]
    reading, writing = os.pipe()  # nothing is ever written: its end is the end of this process
    try:
        run = subprocess.run(
            command,
            env=environment,
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is the run's, which saves a last checkpoint
        )
    finally:
        os.close(reading)
        os.close(writing)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [_exit_reason(run.returncode)]
        kind = ConfigError if run.returncode == ConfigError.exit_code else CheckpointError
        raise kind(f"exporting {checkpoint} failed: {lines[-1].removeprefix('error: ')}")


def main(arguments: list[str]) -> None:
    """What that process does: ``python -m megatron_ds.train.save_hf CHECKPOINT OUTPUT``."""
    os.nice(NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    path, output = map(Path, arguments)
    checkpoint = open_checkpoint(path, verify=False)  # written, hashed and checked a moment ago
    ours = read_config(checkpoint).megatron_ds
    verified = num_parameters(ours.model, ours.moe) <= MAX_VERIFIED_PARAMETERS
    command = ["megatron-ds", "export-hf", "--load", str(path), "--output", str(output)]
    command += ["--verify"] if verified else []
    export(checkpoint, output, ExportOptions(force=True, verify=verified, command=shlex.join(command)))


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _exit_reason(code: int) -> str:
    return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _exported_loss(output: Path) -> float:
    """Validation loss of an export; infinite when it has none, or its report cannot be read."""
    try:
        loss = json.loads((output / REPORT).read_bytes())["validation_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if loss is None else loss


def _message(output: Path) -> str:
    """What was exported, and how near it is to the model."""
    report = json.loads((output / REPORT).read_bytes())
    parity = report["parity"]
    if parity:
        proof = f"max |diff| of logits {parity['max_logit_difference']:.1e}, limit {parity['limit']:.1e}"
    else:
        proof = f"not verified: {report['not_verified']}"
    return f"exported step {report['checkpoint']['step']} as {report['target']} to {output} ({proof})"


if __name__ == "__main__":
    run_main(main)
