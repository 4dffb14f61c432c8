"""Remote code goes to a temporary cache; one tokenizer serves all tests."""

import pytest
from tiny_checkpoint import train_tokenizer
from transformers import dynamic_module_utils


@pytest.fixture(autouse=True, scope="session")
def module_cache(tmp_path_factory):
    """Where transformers copies remote code before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """A byte-level BPE tokenizer of 301 tokens."""
    return train_tokenizer(tmp_path_factory.mktemp("data") / "tokenizer")
