"""The tokenizer's files in an export, written so that transformers 4 and 5 load the same ids.

tokenizer.json is copied byte for byte. tokenizer_config.json is rewritten where loaders disagree: with the class left
out, AutoTokenizer goes by the model type and may replace the pre-tokenizer; the name that transformers 5 saves is
unknown to 4; PreTrainedTokenizerFast is read right by both. Code references of the source are not carried over.
"""

import shutil
from functools import cached_property
from pathlib import Path

from megatron_ds.data.tokenizer import SPECIAL_TOKEN_KEYS, Tokenizer
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets.common import SpecialIds
from megatron_ds.hf.writer import write_json

NOT_CARRIED = ("auto_map", "name_or_path", "tokenizer_file", "backend", "is_local", "local_files_only")
"""Keys of a source's tokenizer_config.json that name code or places of its own."""


class TokenizerFiles:
    """A tokenizer directory, checked against the model that it belongs to.

    ``eod_id`` is the end-of-document id that the run trained with, None for the tokenizer's own. Raises DataError when
    the directory holds no tokenizer, ConfigError when it has ids that the vocabulary of the model does not cover.
    """

    def __init__(self, directory: Path, vocab_size: int, eod_id: int | None) -> None:
        self.directory = directory
        self.tokenizer = Tokenizer.load(directory)
        if self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"{directory}: token id {self.tokenizer.vocab_size - 1} lies outside the model's vocabulary of "
                f"{vocab_size}; give the tokenizer of the training run with --tokenizer"
            )
        self.eod_id = self.tokenizer.eod_id if eod_id is None else eod_id
        if self.tokenizer.backend.id_to_token(self.eod_id) is None:
            raise ConfigError(
                f"{directory}: has no token {self.eod_id}, which ended the documents in training (data.eod_id); "
                "give the tokenizer of the training run with --tokenizer"
            )

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that the source names, as plain strings; eos is the token that ended documents."""
        config = self.tokenizer.config
        named = {key: config[key] for key in SPECIAL_TOKEN_KEYS if config.get(key)}
        tokens = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items()}
        return tokens | {"eos_token": self.tokenizer.backend.id_to_token(self.eod_id)}

    def special_ids(self) -> SpecialIds:
        """Ids for config.json; a tokenizer without bos begins a text as training began a document: after eos."""
        ids = {key: self.tokenizer.backend.token_to_id(token) for key, token in self.special_tokens.items()}
        return SpecialIds(bos=ids.get("bos_token", self.eod_id), eos=self.eod_id, pad=ids.get("pad_token"))

    def write(self, directory: Path, max_positions: int) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, the template."""
        shutil.copyfile(self.directory / "tokenizer.json", directory / "tokenizer.json")
        config = {key: value for key, value in self.tokenizer.config.items() if key not in NOT_CARRIED}
        config |= self.special_tokens
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_positions,
            "clean_up_tokenization_spaces": False,
        }
        write_json(directory / "tokenizer_config.json", config)
        write_json(directory / "special_tokens_map.json", self.special_tokens)
        # Old configs may hold a list of named templates instead; it stays in tokenizer_config.json.
        if isinstance(config.get("chat_template"), str):
            (directory / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")
