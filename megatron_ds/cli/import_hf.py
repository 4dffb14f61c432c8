"""``megatron-ds import-hf``: write a Hugging Face directory as a checkpoint."""

import argparse
from pathlib import Path

HELP = "Write a Hugging Face directory as a checkpoint, to continue from or to export again."
EXAMPLE = "megatron-ds import-hf --input Qwen3-0.6B --output checkpoints/qwen3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    add("--input", type=Path, metavar="DIR", required=True, help="Hugging Face directory (config.json and weights)")
    add("--output", type=Path, metavar="DIR", required=True, help="checkpoint directory to write; must not exist")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer directory; by default the input's own")


def run(args: argparse.Namespace) -> int:
    """Import and say what was written."""
    # Here, since torch takes seconds to import and --help should not.
    from megatron_ds.hf.import_model import import_model

    imported = import_model(args.input, args.output, args.tokenizer)
    print(f"imported {imported.model_type} with {imported.parameters:,} weights to {imported.path}")
    for note in imported.notes:
        print(f"note: {note}")
    print(f"begin a run with it: pretrain.py --load {args.output} --finetune, and the model section of its config")
    return 0
