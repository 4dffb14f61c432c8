"""``megatron-ds export-hf``: write a checkpoint as a Hugging Face directory."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_ds.hf.options import FORMATS, MTP_PLACES, ExportOptions, parse_size
from megatron_ds.hf.targets import TARGETS

HELP = "Write a checkpoint as a directory that stock transformers loads."
EXAMPLE = "megatron-ds export-hf --load runs/v1_tiny/checkpoints --output hf_model --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    add("--load", type=Path, metavar="DIR", required=True, help="checkpoint directory, or one step in it")
    add("--output", type=Path, metavar="DIR", required=True, help="directory to write; must not exist without --force")
    families = ["auto", *TARGETS]
    which = "auto takes the first that can express the model (docs/export.md: what each can hold)"
    add("--target", default="auto", choices=families, help=f"model family; {which}")
    places = "in the same files, in OUTPUT-mtp or nowhere; auto: wherever the output then loads without a warning"
    add("--mtp", default="auto", choices=["auto", *MTP_PLACES], help=f"blocks of multi-token prediction: {places}")
    add("--dtype", choices=list(FORMATS), help="number format of the weights; by default the run's")
    add("--ema", action="store_true", help="export the running mean of the weights (training with --ema-decay)")
    add("--verify", action="store_true", help="load the result in a fresh process, compare it with the training model")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer directory; by default the checkpoint's copy")
    add("--max-shard-size", metavar="SIZE", default="4GiB", help="largest weight file: 4GiB (default), 500MB ...")
    add("--force", action="store_true", help="replace an existing Hugging Face directory")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    options = ExportOptions(
        target=args.target,
        mtp=args.mtp,
        precision=args.dtype,
        tokenizer=args.tokenizer,
        max_shard_size=parse_size(args.max_shard_size),
        force=args.force,
        verify=args.verify,
        command=shlex.join(["megatron-ds", *sys.argv[1:]]),
    )
    # Here, since torch takes seconds to import and --help should not.
    from megatron_ds.checkpoint.store import open_checkpoint
    from megatron_ds.hf.decoder import read_config
    from megatron_ds.hf.export import export, mtp_directory

    checkpoint = open_checkpoint(args.load)
    checkpoint = checkpoint.averaged() if args.ema else checkpoint
    exported = export(checkpoint, args.output, options)
    target = exported.target
    print(f"exported step {checkpoint.step} as {target.model_type} to {args.output}")
    blocks = read_config(checkpoint).megatron_ds.model.mtp_num_layers
    if blocks:
        places = {"inline": "in the same files", "separate": f"in {mtp_directory(args.output)}", "drop": "left out"}
        print(f"blocks of multi-token prediction ({blocks}): {places[exported.mtp]}")
    if not (args.output / "tokenizer.json").exists():
        print("note: without a tokenizer, since the run had none; add one with --tokenizer DIR")
    print(f"engines: {target.engines}")
    return 0
