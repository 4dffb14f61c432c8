"""``megatron-ds train-tokenizer``: learn a byte-level BPE from text files."""

import argparse
import sys

from megatron_ds.data.sources import BadRecords, find_inputs, read_texts
from megatron_ds.data.tokenizer import train_bpe

HELP = "Learn a byte-level BPE tokenizer from text files."
EXAMPLE = "megatron-ds train-tokenizer --input data/raw --vocab-size 4096 --output data/tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add = parser.add_argument
    inputs = "files, globs or folders: txt, jsonl, json (also .gz, .zst), parquet, saved datasets"
    add("--input", nargs="+", required=True, metavar="PATH", help=inputs)
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields with the text (default: text)")
    add("--vocab-size", type=int, required=True, help="most ids to make, the two special tokens included")
    add("--output", required=True, metavar="DIR", help="folder of the tokenizer")


def run(args: argparse.Namespace) -> int:
    """Train and say what was written."""
    texts = read_texts(find_inputs(args.input), args.json_keys, BadRecords(), "reading")
    tokenizer = train_bpe(texts, args.vocab_size, show_progress=sys.stderr.isatty())
    tokenizer.save(args.output)
    fewer = (
        f" ({args.vocab_size:,} were asked for; the text has no more)" if tokenizer.vocab_size < args.vocab_size else ""
    )
    print(f"{args.output}: {tokenizer.vocab_size:,} ids{fewer}; documents end with id {tokenizer.eod_id}")
    return 0
