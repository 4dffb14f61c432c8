"""export_report.json: what an export was made from and with, and how it was proved.

It stands in every exported directory. All of it follows from the checkpoint, the versions and the command, so the same
export made twice has the same report; the run's settings are in it but for those of services that only watched the run.
The figures of the proof are measured in ``verify.py``.
"""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import megatron_ds
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.retention import validation_loss
from megatron_ds.config.schema import RunConfig
from megatron_ds.hf.plan import Entry
from megatron_ds.hf.targets.common import Target

REPORT = "export_report.json"
NOT_VERIFIED = "run export-hf --verify"
"""Why there are no figures of parity, when nothing stood in their way."""

PACKAGES = ("torch", "transformers", "safetensors", "deepspeed")
SERVICES = {"wandb", "tensorboard", "csv_monitor", "comet"}
"""Sections of a run's configuration that name accounts and projects; all others have no place for a secret."""


@dataclass(frozen=True)
class Check:
    """One line of a proof; ``passed`` is None for a figure that is only reported."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok    ", False: "FAILED", None: "note  "}[self.passed]
        return f"{mark} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Rounding:
    """What an export in 16 bits lost: its logits against those of the weights before they were rounded."""

    max_logit_difference: float
    top1_agreement: float
    """Share of the positions at which both prefer the same token."""


@dataclass(frozen=True)
class Parity:
    """How near stock transformers comes to the training model with an export, both in fp32 and equally rounded."""

    max_logit_difference: float
    """Largest |difference|, of all implementations; NaN when no position could be compared."""
    limit: float
    """What that may be."""
    top1_agreement: float
    """Share of the compared positions at which both prefer the same token."""
    tokens_compared: int
    """Positions whose logits were compared, with every implementation."""
    tokens_left_out: int
    """Positions after a tie between experts."""
    implementations: tuple[str, ...]
    """Of attention and experts in transformers."""
    cached_equals_uncached: bool
    """Whether greedy generation gives the same tokens with and without its cache."""
    tokenizer_equal: bool | None
    """Whether AutoTokenizer gives the ids of training; None without a tokenizer."""
    rounding: Rounding | None
    """None for an export in fp32."""
    checks: tuple[Check, ...]
    """The same, judged and in words."""


def export_report(
    checkpoint: Checkpoint,
    run: RunConfig,
    target: Target,
    precision: str,
    command: str,
    entries: list[Entry],
    parity: Parity | None,
    not_verified: str = NOT_VERIFIED,
) -> dict[str, Any]:
    """Content of the report, JSON, for a directory with these entries.

    ``parity`` is what ``verify`` returned; None, with the reason ``not_verified``, where it did not run.
    """
    figures = asdict(parity) if parity else None
    return {
        "target": target.model_type,
        "precision": precision,
        "checkpoint": {"step": checkpoint.step, "manifest_sha256": checkpoint.manifest.sha256},
        "validation_loss": validation_loss(checkpoint.trainer),
        "weights": {
            "tensors": len(entries),
            "parameters": sum(entry.numel for entry in entries),
            "bytes": sum(entry.num_bytes for entry in entries),
        },
        "checks": figures.pop("checks") if figures else [],
        "parity": figures,
        "not_verified": None if parity else not_verified,
        "command": command,
        "versions": versions(),
        "config": public_config(run),
    }


def versions() -> dict[str, str]:
    """What an export depends on, by name."""
    packages = {name: version(name) for name in PACKAGES}
    return {"megatron_ds": megatron_ds.__version__, **packages, "python": platform.python_version()}


def public_config(run: RunConfig) -> dict[str, Any]:
    """The resolved configuration without the sections of services, JSON."""
    return run.model_dump(mode="json", exclude=SERVICES)
