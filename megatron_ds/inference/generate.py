"""Sampling text from a checkpoint or from a Hugging Face directory.

There is one implementation of sampling, of the cache and of decoding, and it is transformers'. A checkpoint is exported
to a temporary directory and loaded from there like any other model, so what is sampled here is what users of an export
will get. Nothing that a directory brings along is executed: models of our own families run the code of this package.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.remote_code.modeling_mds_dense import MdsDenseForCausalLM
from megatron_ds.hf.remote_code.modeling_mds_moe import MdsMoeForCausalLM
from megatron_ds.hf.sections import is_hugging_face_directory
from megatron_ds.inference.sampling import Sampling

OURS = {kind.config_class.model_type: kind for kind in (MdsDenseForCausalLM, MdsMoeForCausalLM)}
"""Families whose code travels with an export -> the package's own copy of their models."""


@contextmanager
def hugging_face_directory(path: Path) -> Iterator[Path]:
    """``path`` itself when it is a Hugging Face directory; else a temporary fp32 export of the checkpoint there.

    Raises CheckpointError when it is neither.
    """
    if is_hugging_face_directory(path):
        yield path
        return
    checkpoint = open_checkpoint(path)
    with tempfile.TemporaryDirectory(prefix="megatron_ds_generate_") as name:
        directory = Path(name) / "model"
        export(checkpoint, directory, ExportOptions(precision="fp32", mtp="drop"))
        yield directory


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in the directory's dtype, on the accelerator if there is one) and tokenizer.

    Raises ConfigError when the model would need code from the directory or when there is no tokenizer, and
    CheckpointError when the weights are not all there.
    """
    model_type = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in OURS and model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{directory}: {model_type} would need code from the directory, which is not executed here")
    if not (directory / "tokenizer_config.json").is_file():
        raise ConfigError(f"{directory}: no tokenizer; export the checkpoint with --tokenizer DIR and use the export")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    loader = OURS.get(model_type, AutoModelForCausalLM)
    model, loading = loader.from_pretrained(directory, dtype="auto", trust_remote_code=False, output_loading_info=True)
    missing = sorted(map(str, loading["missing_keys"]))
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} weights are missing, the first is {missing[0]}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(
        directory, config=model.config, trust_remote_code=False
    )


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling, live: bool = False
) -> Iterator[str]:
    """Yield ``sampling.num_samples`` texts, each the prompt with its continuation, drawn when it is asked for.

    The draws follow from the seed one after the other. ``live`` also prints the tokens as they come. An empty prompt
    starts a document; ConfigError if the model has no token for that.
    """
    ends = model.generation_config.eos_token_id
    eos = ends[0] if isinstance(ends, list) else ends
    begin = eos if model.generation_config.bos_token_id is None else model.generation_config.bos_token_id
    ids = tokenizer(prompt).input_ids or [begin]
    if None in ids:
        raise ConfigError('--prompt "": this model names no token to start from; give a prompt')
    longest = model.config.max_position_embeddings
    if len(ids) + sampling.max_new_tokens > longest:
        print(f"note: prompt and new tokens may go beyond the {longest} positions of the model", file=sys.stderr)

    prompt_1S = torch.tensor([ids], device=model.device)
    torch.manual_seed(sampling.seed)
    for _ in range(sampling.num_samples):
        output_1S = model.generate(
            prompt_1S,
            attention_mask=torch.ones_like(prompt_1S),
            pad_token_id=eos,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if live else None,
            **sampling.options(),
        )
        yield tokenizer.decode(output_1S[0], skip_special_tokens=True)
