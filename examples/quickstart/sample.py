"""Load the export with stock transformers, generate, and show the validation loss before and after training."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "def read_lines(path):\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="exported directory")
    parser.add_argument("--run", required=True, type=Path, help="run directory with ledger.jsonl")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters\n")
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))

    rows = [json.loads(line) for line in (arguments.run / "ledger.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row.get("kind") == "eval"]
    print("\nvalidation         loss    bits per byte")
    for name, row in (("before training", evaluations[0]), ("after training", evaluations[-1])):
        print(f"{name:<16} {row['eval/loss']:>6.3f} {row['eval/bits_per_byte']:>16.3f}")


if __name__ == "__main__":
    main()
