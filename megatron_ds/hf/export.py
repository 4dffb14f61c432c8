"""A checkpoint becomes a Hugging Face directory.

The target says how (names and config.json), ``plan.py`` lists the tensors, the writer streams them, and everything else
is small files. All of it is written beside the output under a hidden name, proved there if asked, forced to the disk
and renamed: the output either does not exist or is whole. MTP blocks go into the same files, or into a directory of
their own beside it, which appears together with it. Training state is not exported; ``verify.py`` does the proving.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ds.checkpoint.manifest import list_names, sync_directory
from megatron_ds.checkpoint.pieces import Box, volume
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.decoder import check_tensors, read_config
from megatron_ds.hf.model_card import model_card, mtp_card
from megatron_ds.hf.options import FORMATS, ExportOptions
from megatron_ds.hf.plan import ROUNDED, Plan, computed_precision
from megatron_ds.hf.report import REPORT, export_report
from megatron_ds.hf.sections import is_hugging_face_directory
from megatron_ds.hf.targets import choose_target, place_mtp
from megatron_ds.hf.targets.common import SpecialIds, Target
from megatron_ds.hf.tokenizer_files import TokenizerFiles
from megatron_ds.hf.verify import verify
from megatron_ds.hf.writer import write_json, write_weights


@dataclass(frozen=True)
class Exported:
    """What an export became."""

    target: Target
    """The family that it was written for."""
    mtp: str
    """Where its MTP blocks are: inline, separate or drop; the last, too, when there are none."""


def export(checkpoint: Checkpoint, output: Path, options: ExportOptions) -> Exported:
    """Write ``output`` and, when MTP blocks are to be separate, ``mtp_directory(output)``.

    Raises ConfigError when no target (or not the requested one) can express the model or hold its MTP blocks as
    requested, when an output exists or the tokenizer does not fit; CheckpointError when the weights are not the model's
    or a check of ``--verify`` fails. Either way nothing is left behind, and what was to be replaced is still there.
    """
    run = read_config(checkpoint)
    model, moe = run.megatron_ds.model, run.megatron_ds.moe
    target = choose_target(model, moe, options.target)
    mtp = place_mtp(target, model, options.mtp)
    precision = options.precision or run.dtype_name
    tokenizer = find_tokenizer(checkpoint, run, options.tokenizer)
    computed = computed_precision(checkpoint.step, run)
    rounded = frozenset(checkpoint.trainer.get(ROUNDED, ()))
    plan = Plan(check_tensors(checkpoint, model, moe), run, target, precision, computed, rounded)
    write = partial(write_weights, read=partial(_read, checkpoint), max_shard_size=options.max_shard_size)
    ids = tokenizer.special_ids() if tokenizer else plain_ids(run)
    report = partial(export_report, checkpoint, run, target, precision, options.command)
    held = model if mtp == "inline" else model.model_copy(update={"mtp_num_layers": 0})
    separate = committed(mtp_directory(output), options.force) if mtp == "separate" else nullcontext()
    with committed(output, options.force) as directory, separate as beside:
        entries = plan.main() + (plan.mtp() if mtp == "inline" else [])
        write(directory, entries)
        _write_configs(directory, target.config(held, moe, ids, FORMATS[precision].name), ids)
        if tokenizer:
            tokenizer.write(directory, model.max_positions)
        for name in target.code_files:
            (directory / name).write_bytes(files("megatron_ds.hf.remote_code").joinpath(name).read_bytes())
        card = model_card(output.name, checkpoint, run, target, precision, mtp, options.command)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if beside:
            drafts = plan.mtp()
            write(beside, drafts)
            config = target.config(model, moe, ids, FORMATS[precision].name)
            write_json(beside / "config.json", config | {"architectures": [target.mtp.architecture]} | _versions())
            (beside / "README.md").write_text(mtp_card(output.name, model), encoding="utf-8")
            write_json(beside / REPORT, report(drafts, None, not_verified="draft blocks have no logits of their own"))
        parity = verify(directory, checkpoint, tokenizer, precision) if options.verify else None
        write_json(directory / REPORT, report(entries, parity))
    return Exported(target, mtp)


def mtp_directory(output: Path) -> Path:
    """Where the MTP blocks of an export are when they are separate."""
    return output.with_name(output.name + "-mtp")


def find_tokenizer(checkpoint: Checkpoint, run: RunConfig, override: Path | None) -> TokenizerFiles | None:
    """The tokenizer to export: the override, else the copy in the checkpoint, else the run's; None if it had none.

    Raises DataError when the chosen directory holds no tokenizer, ConfigError when it does not fit the model.
    """
    data = run.megatron_ds.data
    copy = checkpoint.path / "tokenizer"
    directory = override or (copy if copy.is_dir() else data.tokenizer and Path(data.tokenizer))
    if not directory:
        return None
    return TokenizerFiles(Path(directory), run.megatron_ds.model.vocab_size, data.eod_id)


def plain_ids(run: RunConfig) -> SpecialIds:
    """Special ids of a run without a tokenizer: its end-of-document id begins and ends a text."""
    eod_id = run.megatron_ds.data.eod_id
    assert eod_id is not None, "a run has a tokenizer or data.eod_id"
    return SpecialIds(bos=eod_id, eos=eod_id, pad=None)


@contextmanager
def committed(output: Path, force: bool) -> Iterator[Path]:
    """A directory to write into, hidden beside ``output``; takes its place when the block ends well, else is removed.

    Raises ConfigError before the block when the output exists and may not be replaced: without ``force``, or because
    it is not a Hugging Face directory; also when the disk refuses.
    """
    output = output.absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not force:
            raise ConfigError(f"--output {output}: exists; choose another directory, or replace it with --force")
        if not is_hugging_face_directory(output):
            raise ConfigError(f"--output {output}: is not a Hugging Face directory, so --force does not replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as hidden:
            directory = Path(hidden) / "export"
            directory.mkdir()
            yield directory
            for name in list_names(directory):
                with (directory / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_directory(directory)
            _take_place(directory, output, aside=Path(hidden) / "replaced")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error}; nothing was changed") from error


def _take_place(directory: Path, output: Path, aside: Path) -> None:
    """Rename ``directory`` to ``output``; what stood there goes to ``aside``, or comes back if the renaming fails."""
    if output.exists():
        output.rename(aside)
    try:
        directory.rename(output)
    except OSError:
        if aside.exists():
            aside.rename(output)
        raise
    sync_directory(output.parent)


def _read(checkpoint: Checkpoint, source: str, box: Box) -> Tensor:
    return checkpoint.read_range(source, "weight", box, 0, volume(box))


def _write_configs(directory: Path, config: dict[str, Any], ids: SpecialIds) -> None:
    """config.json and generation_config.json."""
    write_json(directory / "config.json", config | _versions())
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    named = {name: value for name, value in special.items() if value is not None}
    write_json(directory / "generation_config.json", named | _versions())


def _versions() -> dict[str, str]:
    return {"transformers_version": version("transformers")}
