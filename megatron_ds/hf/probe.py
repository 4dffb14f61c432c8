"""The other half of ``verify.py``: what stock transformers makes of an export, in a process of its own.

Run as a plain script by a fresh interpreter, offline, with an empty module cache. It imports torch, transformers and
safetensors and nothing of this package, so that what it sees is what a user of the directory will see. It measures and
writes down; the judgement is ``verify.py``'s.

    python probe.py EXPORT_DIRECTORY WORK_DIRECTORY

WORK_DIRECTORY holds request.json (``trust_remote_code``, ``implementations`` (name -> those of
attention and experts), ``texts``, ``prompt_length``, ``new_tokens``, ``positions``) and tokens.safetensors
(``token_NS``); the script adds answer.json and logits.safetensors (one tensor [N, P, V] per name, at the P positions).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(directory: Path, work: Path) -> None:
    """Answer one request."""
    request = json.loads((work / "request.json").read_text())
    token_NS = load_file(work / "tokens.safetensors")["token_NS"]
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=request["trust_remote_code"],
        output_loading_info=True,
    )
    logits = {}
    for name, (attention, experts) in request["implementations"].items():
        model.set_attn_implementation(attention)
        if experts:
            model.set_experts_implementation(experts)
        rows = [model(token_S[None], use_cache=False).logits[:, request["positions"]] for token_S in token_NS]
        logits[name] = torch.cat(rows).contiguous()
    save_file(logits, work / "logits.safetensors")

    prompt_1P = token_NS[-1:, : request["prompt_length"]]
    greedy = {
        name: model.generate(
            prompt_1P,
            attention_mask=torch.ones_like(prompt_1P),
            do_sample=False,
            use_cache=use_cache,
            min_new_tokens=request["new_tokens"],
            max_new_tokens=request["new_tokens"],
        )[0].tolist()
        for name, use_cache in (("cached", True), ("uncached", False))
    }
    answer = {
        "keys": {name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys")},
        "greedy": greedy,
        "tokenizer": _tokenize(directory, request["texts"]),
    }
    (work / "answer.json").write_text(json.dumps(answer))


def _tokenize(directory: Path, texts: list[str]) -> list[dict]:
    """Ids and decoded text of each text, by AutoTokenizer."""
    if not texts:
        return []
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [{"ids": row, "text": tokenizer.decode(row, clean_up_tokenization_spaces=False)} for row in ids]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
