"""Text to token ids and back, on Hugging Face's ``tokenizers`` alone: a tokenizer is a folder with a tokenizer.json.

The one idea: text is never trusted. A document that spells ``<|endoftext|>`` is encoded as those thirteen characters,
so only we place special tokens. Stock ``transformers``, old and new, reads the same ids from the folders written here.
Chat templates are not applied here.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from megatron_ds.data.indexed import write_atomically
from megatron_ds.errors import DataError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
NUM_BYTES = 256
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Everything that makes a tokenizer; its folder may hold a whole model beside them."""
SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the blank or sign before it
    r"|\p{N}{1,3}"  # numbers in groups of at most three digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # line ends, indentation
)
"""Merges never cross these pieces; the pattern of GPT-4, Llama 3 and Qwen 2 with their limit of three digits."""


def kept_files(directory: str | Path | None) -> dict[str, Path]:
    """What a checkpoint keeps of a tokenizer, by name in the checkpoint: an export needs it, wherever it is made."""
    files = {f"tokenizer/{name}": Path(directory) / name for name in FILES} if directory is not None else {}
    return {name: path for name, path in files.items() if path.is_file()}


class Tokenizer:
    """A tokenizer and what its folder says about it (tokenizer_config.json)."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        # Settings of a chat server that would cut or lengthen documents, or read special tokens out of them.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.config = config

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a folder written by ``save`` or by transformers. Raises DataError if it is missing or damaged."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"{path}: not found; make it with megatron-ds train-tokenizer, or load a slow tokenizer with "
                "transformers' AutoTokenizer and save_pretrained it"
            )
        if not isinstance(_read_json(path).get("model"), dict):
            raise DataError(f"{path}: has no model, so it is no tokenizer; copy the file again")
        config = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        if (template := directory / "chat_template.jinja").is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(tokenizers.Tokenizer.from_file(str(path)), config)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        # transformers 5 writes a class name that 4 does not know; this one is read by both.
        config = self.config | {"tokenizer_class": "PreTrainedTokenizerFast"}
        special = {key: config[key] for key in SPECIAL_TOKEN_KEYS if config.get(key)}
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False),
        }
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                write_atomically(str(Path(directory) / name), (text + "\n").encode())
        except OSError as error:
            raise DataError(f"{directory}: cannot be written ({error.strerror}); choose another folder") from error

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: special tokens in it are spelled out, none is added."""
        # The batch call is a third faster than encode, which also tracks where each token lies in the text.
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; the embedding may be padded beyond it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eod_id(self) -> int:
        """Id that ends a document: the folder's eos_token, or ``<|endoftext|>``. Raises DataError if it has neither."""
        declared = self.config.get("eos_token") or END_OF_TEXT
        token = declared["content"] if isinstance(declared, dict) else declared
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"the tokenizer has no token {token!r} to end documents with; set eos_token in tokenizer_config.json"
            )
        return token_id


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` ids, ``<|endoftext|>`` (bos = eos) and ``<|pad|>`` included.

    Any text survives encode and decode unchanged. Little text gives fewer ids than asked for. The same texts give the
    same tokenizer. Raises DataError if ``vocab_size`` leaves no room for the bytes, or if there is no text.
    """
    special = [END_OF_TEXT, PAD]
    if vocab_size < NUM_BYTES + len(special):
        raise DataError(
            f"a byte-level vocabulary of {vocab_size} ids is too small; it needs {NUM_BYTES} bytes and "
            f"{len(special)} special tokens: set --vocab-size to {NUM_BYTES + len(special)} or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == NUM_BYTES + len(special) < vocab_size:
        raise DataError("the input has too little text to learn a single merge; give more text")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    return Tokenizer(backend, config)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is no JSON object; copy the file again")
    return value
