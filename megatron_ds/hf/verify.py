"""Proof of an export: stock transformers, in a fresh offline process, against the training model.

The training model is rebuilt from the checkpoint here; ``probe.py`` loads the directory there, with nothing of this
package. Both see the same tokens, random and real, in sequences longer than the attention window. An export in 16 bits
is held to the same tolerance, against weights rounded the same way; what the rounding itself costs is reported beside
it. Every check prints one line; ``report.py`` keeps them, with the figures, in the export.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.decoder import load_decoder, read_config
from megatron_ds.hf.options import FORMATS
from megatron_ds.hf.plan import computed_precision, held_precision
from megatron_ds.hf.report import Check, Parity, Rounding
from megatron_ds.hf.targets import TARGETS
from megatron_ds.hf.targets.common import Target
from megatron_ds.hf.tokenizer_files import TokenizerFiles
from megatron_ds.hf.writer import write_json
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.moe.router import Router, Routing

TOLERANCE = 2e-5
"""Largest |logit difference| between the export and the training model, both computed in fp32; where logits exceed 1,
times the largest |logit|, as rounding errors grow with the values."""

TIE_NOISE, TIE_DRAWS = 2e-6, 4
"""Relative change of a router's input, a few times what rounding does to it, and how often it is drawn: experts that
any of these changes swaps count as tied."""

IMPLEMENTATIONS = {"eager": ("eager", None), "sdpa": ("sdpa", None)}
EXPERT_IMPLEMENTATIONS = {"eager": ("eager", "eager"), "sdpa and grouped_mm": ("sdpa", "grouped_mm")}
"""Name in the report -> transformers' implementation of attention and of experts: written out, and its default."""

NUM_RANDOM, MIN_LENGTH, MAX_POSITIONS_COMPARED, NEW_TOKENS = 2, 128, 128, 16
"""Random sequences beside the real one, shortest length of all, positions whose logits are compared, tokens drawn."""

TEXTS = (
    "The window slides over the text: a key at distance d is local when d is no larger than the window, and everything "
    "farther away is left to the global layers. Numbers such as 3.14159, 2048 and 1e-5 are split in their own way.",
    'def attention(query, key, value):\n    """Values by key."""\n    return softmax(query @ key.T) @ value\n',
    "Grüße aus Zürich, żółw, naïve café, 東京, Привет, 🙂👩‍🔬  two  spaces\tand\ttabs\r\n",
)
"""What the tokenizers are compared on; repeated, also the real sequence."""


def verify(
    directory: Path,
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles | None,
    precision: str,
    report: Callable[[str], None] = print,
) -> Parity:
    """Compare the export in ``directory`` with the checkpoint and return what was measured.

    ``precision`` is the export's (a key of ``options.FORMATS``); ``report`` receives one line per check. Raises
    CheckpointError when a check fails, or when the directory cannot be loaded at all.
    """
    run = read_config(checkpoint)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    target = TARGETS[config["model_type"]]
    token_NS = _sequences(run.megatron_ds.model, tokenizer)
    position_P = torch.linspace(0, token_NS.shape[1] - 1, min(token_NS.shape[1], MAX_POSITIONS_COMPARED)).long()
    report(f"verifying with transformers {version('transformers')} in a fresh offline process")
    if target.code_files:
        carried = f"the directory carries the {target.model_type} code of this package"
        report(f"note   loading with trust_remote_code=True: {carried}")
    texts = list(TEXTS) if tokenizer else []
    answer, logits = _probe(directory, token_NS, position_P, texts, target)

    decoder = load_decoder(checkpoint, partial(_dtype, computed_precision(checkpoint.step, run), target, precision))
    reference_NPV, decided_NP = _reference_logits(decoder, token_NS, position_P)
    limit = TOLERANCE * max(1.0, reference_NPV.abs().max().item())
    largest = {name: _largest(found - reference_NPV, decided_NP) for name, found in logits.items()}
    same_NP = logits["eager"].argmax(-1) == reference_NPV.argmax(-1)
    rounding = None
    if precision != "fp32":
        exact_NPV, _ = _reference_logits(load_decoder(checkpoint), token_NS, position_P)
        rounding = _rounding(logits["eager"], exact_NPV)
    greedy, tokenized = answer["greedy"]["cached"] == answer["greedy"]["uncached"], None
    checks = [_check_keys(answer["keys"], config)]
    checks += [_check_logits(name, found, limit, decided_NP, precision) for name, found in largest.items()]
    checks += [_note_rounding(rounding, precision)] if rounding else []
    checks += [Check("greedy generation", greedy, f"{NEW_TOKENS} tokens, cached {'==' if greedy else '!='} uncached")]
    if tokenizer:
        checks.append(_check_tokenizer(answer["tokenizer"], tokenizer))
        tokenized = checks[-1].passed
    for check in checks:
        report(str(check))
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise CheckpointError(f"{checkpoint.path}: the export is not the model: {', '.join(failed)}")
    return Parity(
        max_logit_difference=max(largest.values()),
        limit=limit,
        top1_agreement=same_NP[decided_NP].float().mean().item(),
        tokens_compared=int(decided_NP.sum()),
        tokens_left_out=int((~decided_NP).sum()),
        implementations=tuple(logits),
        cached_equals_uncached=greedy,
        tokenizer_equal=tokenized,
        rounding=rounding,
        checks=tuple(checks),
    )


def _sequences(model: ModelConfig, tokenizer: TokenizerFiles | None) -> Tensor:
    """token_NS: random sequences and, with a tokenizer, a real one; long enough for keys beyond the window."""
    length = max(MIN_LENGTH, getattr(model.attention, "window", 0) + 1 + 2 * NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    random_NS = torch.randint(model.vocab_size, (NUM_RANDOM, length), generator=generator)
    if tokenizer is None:
        return random_NS
    ids = tokenizer.tokenizer.encode("\n".join(TEXTS))
    repeated = (ids * (length // len(ids) + 1))[:length]
    return torch.cat((random_NS, torch.tensor([repeated])))


def _probe(
    directory: Path, token_NS: Tensor, position_P: Tensor, texts: list[str], target: Target
) -> tuple[dict, dict[str, Tensor]]:
    """Ask ``probe.py``: its answer and, per implementation, logits_NPV."""
    with tempfile.TemporaryDirectory(prefix="megatron_ds_verify_") as name:
        work = Path(name)
        request = {
            "trust_remote_code": bool(target.code_files),
            "implementations": EXPERT_IMPLEMENTATIONS if target.has_experts else IMPLEMENTATIONS,
            "texts": texts,
            "prompt_length": token_NS.shape[1] - NEW_TOKENS,
            "new_tokens": NEW_TOKENS,
            "positions": position_P.tolist(),
        }
        write_json(work / "request.json", request)
        save_file({"token_NS": token_NS}, work / "tokens.safetensors")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        script = Path(__file__).with_name("probe.py")
        # -P: the script's folder must not become importable in the fresh process.
        command = [sys.executable, "-P", str(script), str(directory), str(work)]
        run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode != 0:
            reason = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1].strip()
            raise CheckpointError(f"{directory.name}: stock transformers cannot load the export: {reason}")
        return json.loads((work / "answer.json").read_text()), load_file(work / "logits.safetensors")


def _dtype(computed: str, target: Target, precision: str, name: str) -> torch.dtype:
    """What the export rounds the tensor of a logical name to."""
    return getattr(torch, FORMATS[held_precision(name, computed, target, precision)].name)


@torch.inference_mode()
def _reference_logits(decoder: Decoder, token_NS: Tensor, position_P: Tensor) -> tuple[Tensor, Tensor]:
    """logits_NPV of the training model over the true vocabulary, and where they can be compared.

    decided_NP is False from the first position of a sequence on at which a router's choice is within rounding: either
    choice is right there, and attention carries the difference to all that follows.
    """
    logits, decided = [], []
    with _watched_routers(decoder) as changed:
        for token_S in tqdm(token_NS, desc="training model", delay=2, leave=False, disable=None):
            changed.clear()
            logits.append(decoder(token_S[None])[:, position_P, : decoder.config.vocab_size])
            ties_S = torch.stack([torch.zeros_like(token_S, dtype=torch.bool), *changed]).any(0)
            decided.append(ties_S.cumsum(0)[position_P] == 0)
    return torch.cat(logits), torch.stack(decided)


@contextmanager
def _watched_routers(decoder: Decoder) -> Iterator[list[Tensor]]:
    """For every call of a router within the block, changed_T: whose experts change when its input does by TIE_NOISE."""
    changed, generator = [], torch.Generator().manual_seed(0)

    def watch(router: Router, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        for _ in range(TIE_DRAWS):
            noise_TD = TIE_NOISE * torch.randn(inputs[0].shape, generator=generator)
            for factor_TD in (
                1 + noise_TD,
                1 - noise_TD,
            ):  # one parts tied experts, the other swaps them
                again_TK = router.forward(inputs[0] * factor_TD).expert_TK
                changed.append((again_TK.sort(1).values != routing.expert_TK.sort(1).values).any(1))

    hooks = [module.register_forward_hook(watch) for module in decoder.modules() if isinstance(module, Router)]
    try:
        yield changed
    finally:
        for hook in hooks:
            hook.remove()


def _check_keys(keys: dict[str, list[str]], config: dict) -> Check:
    """Nothing is missing; nothing is unexpected but MTP blocks that the directory declares, as layers past the last."""
    first, blocks = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    declared = tuple(f"model.layers.{layer}." for layer in range(first, first + blocks))
    surplus = [name for name in keys["unexpected_keys"] if not name.startswith(declared)]
    found = [f"{kind} {names}" for kind, names in (("missing", keys["missing_keys"]), ("unexpected", surplus)) if names]
    drafts = f"; {blocks} MTP block(s), which other engines read" if blocks else ""
    return Check("weights", not found, "; ".join(found) or f"0 missing, 0 unexpected{drafts}")


def _largest(difference_NPV: Tensor, decided_NP: Tensor) -> float:
    """Largest absolute value where positions can be compared; NaN when none can."""
    compared = difference_NPV[decided_NP].abs()
    return compared.max().item() if compared.numel() else math.nan


def _check_logits(implementation: str, largest: float, limit: float, decided_NP: Tensor, precision: str) -> Check:
    if not decided_NP.any():
        return Check(f"logits, {implementation}", False, "every router is undecided from the first position on")
    versus = "" if precision == "fp32" else f", weights of both rounded to {precision}"
    ties = int((~decided_NP).sum())
    left_out = f", {ties} of {decided_NP.numel()} positions left out after ties between experts" if ties else ""
    detail = f"max |diff| {largest:.1e}, limit {limit:.1e}{versus}{left_out}"
    return Check(f"logits, {implementation}", largest <= limit, detail)


def _rounding(logits_NPV: Tensor, exact_NPV: Tensor) -> Rounding:
    same_NP = logits_NPV.argmax(-1) == exact_NPV.argmax(-1)
    return Rounding((logits_NPV - exact_NPV).abs().max().item(), same_NP.float().mean().item())


def _note_rounding(rounding: Rounding, precision: str) -> Check:
    detail = f"top-1 agreement {rounding.top1_agreement:.2%}, max |diff| {rounding.max_logit_difference:.1e}"
    return Check(f"rounding to {precision}", None, detail)


def _check_tokenizer(answers: list[dict], tokenizer: TokenizerFiles) -> Check:
    """AutoTokenizer must give the ids that training saw, and the text that they stand for."""
    ids = [tokenizer.tokenizer.encode(text) for text in TEXTS]
    expected = [{"ids": row, "text": tokenizer.tokenizer.decode(row)} for row in ids]
    detail = f"AutoTokenizer gives the ids of tokenizer.json ({sum(map(len, ids))} compared) and their text"
    return Check("tokenizer", answers == expected, detail)
