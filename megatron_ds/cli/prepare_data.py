"""``megatron-ds prepare-data``: turn text files into Megatron's .bin/.idx."""

import argparse

from megatron_ds.data.prepare import EncodeJob, default_workers, prepare
from megatron_ds.data.sources import BadRecords, find_inputs
from megatron_ds.errors import ConfigError

HELP = "Turn text files into token files (Megatron's .bin and .idx)."
EXAMPLE = "megatron-ds prepare-data --input data/raw --tokenizer data/tokenizer --output-prefix data/corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add, policy = parser.add_argument, BadRecords()
    inputs = "files, globs or folders: txt (one document each), jsonl, json (also .gz, .zst), parquet, saved datasets"
    add("--input", nargs="+", required=True, metavar="PATH", help=inputs)
    add("--tokenizer", required=True, metavar="DIR", help="folder with a tokenizer.json")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and .idx, for --data-path PREFIX")
    keys = "fields to encode (default: text); several are written as PREFIX_KEY_document"
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    add("--workers", type=int, default=default_workers(), help="processes (default: %(default)s); same output for any")
    eod = "end each document with the end-of-document token (default)"
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help=eod)
    bad = "stop at the first line that is no document (default), or report it and go on"
    add("--on-bad-line", choices=["error", "skip"], default=policy.policy, help=bad)
    fraction = "largest share of lines to skip (default: %(default)s)"
    add("--max-bad-fraction", type=float, default=policy.max_fraction, metavar="F", help=fraction)


def run(args: argparse.Namespace) -> int:
    """Prepare and print one line per corpus."""
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one process must work; set it to 1 or more")
    if not 0 <= args.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {args.max_bad_fraction}: must lie between 0 and 1")
    job = EncodeJob(args.tokenizer, tuple(dict.fromkeys(args.json_keys)), args.append_eod)
    bad = BadRecords(args.on_bad_line, args.max_bad_fraction)
    for corpus in prepare(find_inputs(args.input), args.output_prefix, job, workers=args.workers, bad=bad):
        print(corpus)
    if bad.count:
        print(f"{bad.count:,} bad lines were skipped")
    return 0
