"""``megatron-ds generate``: continue a prompt with a checkpoint or a Hugging Face directory."""

import argparse
import sys
from pathlib import Path

from megatron_ds.inference.sampling import Sampling

HELP = "Continue a prompt with a checkpoint or a Hugging Face directory."
EXAMPLE = 'megatron-ds generate --load runs/v1_tiny/checkpoints --prompt "The with statement" --temperature 0.7'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add, default = parser.add_argument, Sampling()
    add("--load", metavar="DIR", type=Path, required=True, help="checkpoint directory or Hugging Face directory")
    add("--prompt", metavar="TEXT", required=True, help='text to continue; "" starts a new document')
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=default.max_new_tokens,
        help="tokens to add at most (default: %(default)s)",
    )
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=default.temperature,
        help="0 takes the likeliest (default: %(default)s)",
    )
    add("--top-k", metavar="K", type=int, help="draw from the k likeliest tokens only")
    add("--top-p", metavar="P", type=float, help="draw from the likeliest tokens that together reach this probability")
    add("--seed", type=int, default=default.seed, help="seed of the draws (default: %(default)s)")
    add(
        "--num-samples", metavar="N", type=int, default=default.num_samples, help="texts to draw (default: %(default)s)"
    )
    add("--no-cache", action="store_true", help="recompute all keys and values for every token")


def run(args: argparse.Namespace) -> int:
    """Print each sample: as it is drawn on a terminal, else when it is done."""
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        num_samples=args.num_samples,
        use_cache=not args.no_cache,
    )
    # Here, since transformers takes seconds to import and --help should not.
    from megatron_ds.inference.generate import generate, hugging_face_directory, load

    live = sys.stdout.isatty()
    with hugging_face_directory(args.load) as directory:
        texts = generate(*load(directory), args.prompt, sampling, live)
        for number in range(1, sampling.num_samples + 1):
            if sampling.num_samples > 1:
                print(f"--- sample {number} of {sampling.num_samples} ---")
            text = next(texts)
            if not live:
                print(text)
    return 0
