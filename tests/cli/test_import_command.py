"""``megatron-ds import-hf`` as a user calls it, and what can follow it."""

import json

import pytest
from tiny_checkpoint import MODELS, export_tiny, save_tiny, train_tokenizer

from megatron_ds.cli.main import main
from megatron_ds.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory of a llama with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(directory / "tokenizer")
    return export_tiny(save_tiny(directory / "trained", tokenizer=tokenizer, **MODELS["llama"]), directory / "model")


def test_import_generate_and_export(model, tmp_path, capsys):
    output = tmp_path / "checkpoints"
    assert main(["import-hf", "--input", str(model), "--output", str(output)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("imported llama with ") and first.endswith(f" weights to {output / 'global_step0'}")
    assert rest == [f"begin a run with it: pretrain.py --load {output} --finetune, and the model section of its config"]
    assert main(["generate", "--load", str(output), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert main(["export-hf", "--load", str(output), "--output", str(tmp_path / "back")]) == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes(), name


def test_what_was_passed_over_is_said(model, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((model / name).read_bytes())
    main(["import-hf", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "checkpoints")])
    assert "\nnote: without a tokenizer: " in capsys.readouterr().out


def test_a_family_that_is_not_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quen3"}))
    with pytest.raises(ConfigError, match=r"model_type quen3 is not a family that can be read; did you mean qwen3\?"):
        main(["import-hf", "--input", str(tmp_path), "--output", str(tmp_path / "checkpoints")])
