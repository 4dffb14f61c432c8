"""Real runs for tests: a small corpus of the standard library, and the command lines that train on it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "megatron_ds": {
        "generation": "v1",
        "model": {
            "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 64,
            "attention": {"kind": "hybrid", "pattern": "LG", "window": 15},
            "hidden_dropout": 0.1, "attention_dropout": 0.1,
        },
        "training": {"train_iters": 20, "eval_interval": 10, "eval_iters": 2, "lr_warmup_iters": 4},
        "checkpoint": {"save_interval": 10},
        "monitor": {"log_interval": 5},
    },
}  # fmt: skip


EXPERTS = CONFIG | {
    "megatron_ds": CONFIG["megatron_ds"]
    | {
        "generation": "v2",
        "model": {
            "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
            "seq_length": 64, "hidden_dropout": 0.1,
        },
        "moe": {
            "num_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 48,
            "moe_layer_freq": [0, 1, 1], "moe_input_jitter_eps": 0.01, "moe_seq_aux_loss_coeff": 1e-3,
            "moe_router_bias_update_rate": 1e-2,
        },
        "parallel": {"expert_model_parallel_size": 2},
    },
}  # fmt: skip


def make_corpus(directory: Path) -> Path:
    """raw/, tokenizer/, corpus.bin/.idx and a small few.bin/.idx in ``directory``, by the commands that users type."""
    python(directory, "-m", "megatron_ds.data.corpus", "raw", "--megabytes", "1")
    cli(directory, "train-tokenizer", "--input", "raw", "--vocab-size", "512", "--output", "tokenizer")
    cli(directory, "prepare-data", "--input", "raw", "--tokenizer", "tokenizer", "--output-prefix", "corpus")
    (directory / "few.txt").write_text("".join(f"{n} bottles of beer on the wall\n" for n in range(200)))
    cli(directory, "prepare-data", "--input", "few.txt", "--tokenizer", "tokenizer", "--output-prefix", "few")
    (directory / "tiny.json").write_text(json.dumps(CONFIG))
    (directory / "experts.json").write_text(json.dumps(EXPERTS))
    return directory


def python(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """``python ARGUMENTS`` in ``directory``."""
    return _run([sys.executable, *arguments], directory, check)


def cli(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """``megatron-ds ARGUMENTS`` in ``directory``."""
    return _run([sys.executable, "-m", "megatron_ds.cli.main", *arguments], directory, check)


def _run(command: list[str], directory: Path, check: bool) -> subprocess.CompletedProcess:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=280)
    assert not check or result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def launch_command(launcher: str, ranks: int, *arguments: str) -> list[str]:
    """A training command under one of the three launchers."""
    script = [str(ROOT / "pretrain.py")]
    script += [] if "--deepspeed_config" in arguments else ["--deepspeed_config", "tiny.json"]
    script += ["--tokenizer", "tokenizer", *arguments]
    script += [] if "--data-path" in arguments else ["--data-path", "corpus"]
    port = str(free_port())
    return {
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, *script],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, *script],
        "python": [sys.executable, *script],
    }[launcher]


def launch(
    directory: Path, launcher: str, ranks: int, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess:
    """Train to the end."""
    return _run(launch_command(launcher, ranks, *arguments), directory, check)


def launch_and_kill(directory: Path, launcher: str, ranks: int, run: str, step: int, *arguments: str) -> None:
    """Train until there is a checkpoint and the ledger has reached ``step``, then kill -9 launcher and ranks."""
    process = subprocess.Popen(
        launch_command(launcher, ranks, *arguments),
        cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    ledger = directory / "runs" / run / "ledger.jsonl"
    latest = directory / "runs" / run / "checkpoints" / "latest"
    while not (latest.exists() and f'"kind": "step", "step": {step},' in ledger.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.01)
    for pid in _descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    import psutil

    parent = psutil.Process(pid)
    return [child.pid for child in parent.children(recursive=True)] + [pid]


def ledger(directory: Path, run: str, kind: str = "step") -> list[dict]:
    """Rows of one kind of a run's ledger."""
    path = directory / "runs" / run / "ledger.jsonl"
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def losses(directory: Path, run: str) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(row["step"], row["train/loss"], row["optim/grad_norm"]) for row in ledger(directory, run)]
