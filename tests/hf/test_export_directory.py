"""What stands in an export directory besides the weights, and when there is one at all."""

import argparse
import json
from pathlib import Path

import pytest
from tiny_checkpoint import MODELS, export_tiny, run_config, save_tiny, train_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.cli import export_hf
from megatron_ds.errors import CheckpointError, ConfigError, DataError
from megatron_ds.hf import export as export_module
from megatron_ds.hf.export import committed, export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.verify import TEXTS

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer_directory):
    """A checkpoint with a copy of its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "checkpoints", tokenizer=tokenizer_directory)


def read_json(path):
    return json.loads(path.read_text())


# --- tokenizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", MODELS)
def test_autotokenizer_gives_the_ids_that_training_saw(tmp_path, tokenizer_directory, target):
    """For every model type: left to itself, AutoTokenizer would pick another pre-tokenizer for some of them."""
    tiny = save_tiny(tmp_path / "checkpoints", tokenizer=tokenizer_directory, **MODELS[target])
    loaded = AutoTokenizer.from_pretrained(export_tiny(tiny, tmp_path / "model"))
    trained = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    for text in (*TEXTS, "a<|endoftext|>b", ""):
        ids = trained.encode(text).ids
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == trained.decode(ids, skip_special_tokens=False)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.model_max_length) == ("<|endoftext|>", 0, 64)


def test_tokenizer_files_carry_everything_but_code_and_places(tmp_path):
    source = train_tokenizer(tmp_path / "tokenizer")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "name_or_path": "/home/someone",
        "add_bos_token": False,
        "chat_template": TEMPLATE,
        "pad_token": {"content": "Ġ", "special": True},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tiny = save_tiny(tmp_path / "checkpoints", tokenizer=source)
    directory = export_tiny(tiny, tmp_path / "model")
    assert (directory / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_json(directory / "tokenizer_config.json") == {
        "add_bos_token": False,
        "chat_template": TEMPLATE,
        "pad_token": "Ġ",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }
    assert (directory / "chat_template.jinja").read_text() == TEMPLATE
    pad = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("Ġ")
    assert read_json(directory / "config.json")["pad_token_id"] == pad
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tiny, tmp_path):
    larger = train_tokenizer(tmp_path / "larger", vocab_size=302)
    with pytest.raises(ConfigError, match="token id 301 lies outside the model's vocabulary of 301"):
        export_tiny(tiny, tmp_path / "model", tokenizer=larger)
    with pytest.raises(DataError, match="not found"):
        export_tiny(tiny, tmp_path / "model", tokenizer=tmp_path)
    assert not (tmp_path / "model").exists()


def test_without_a_tokenizer_the_ids_come_from_the_run(tmp_path):
    directory = export_tiny(save_tiny(tmp_path / "checkpoints"), tmp_path / "model")
    assert not (directory / "tokenizer.json").exists()
    config = read_json(directory / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, None)


# --- the other files ------------------------------------------------------------------------------------------------


def test_the_files_of_an_export(tiny, tmp_path):
    directory = export_tiny(tiny, tmp_path / "model", command="megatron-ds export-hf --load x")
    names = {"README.md", "config.json", "export_report.json", "generation_config.json", "model.safetensors",
             "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert {path.name for path in directory.iterdir()} == names
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 0)
    assert not generation.do_sample
    card = (directory / "README.md").read_text()
    parameters = sum(p.numel() for p in tiny.decoder.parameters()) - (384 - 301) * 48
    facts = [
        f"{parameters:,} (fp32)",
        "hybrid LLLG, window 256",
        "| Optimizer steps | 7 |",
        "| Training tokens | 3,584 |",
        "| Training loss | 5.4321 |",
        "| Validation loss, valid | 5.5000 |",
        "megatron-ds export-hf --load x",
        '"num_attention_heads": 4',
        "Engines: transformers.",
    ]
    for fact in facts:
        assert fact in card, fact
    assert "trust_remote_code" not in card


def test_the_runs_precision_is_the_default(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints")
    config = tiny.checkpoint.config
    config["bf16"]["enabled"] = True
    assert read_json(export_tiny(tiny, tmp_path / "model") / "config.json")["dtype"] == "bfloat16"


# --- there is a whole export, or none -------------------------------------------------------------------------------


def assert_nothing_left(parent, *names):
    assert sorted(path.name for path in parent.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), ConfigError)],
)
def test_an_interrupted_export_leaves_no_directory(tiny, tmp_path, monkeypatch, failure, seen):
    def interrupt(*_):
        raise failure

    parent = tmp_path / "exports"
    monkeypatch.setattr(export_module, "model_card", interrupt)
    with pytest.raises(seen):
        export_tiny(tiny, parent / "model")
    assert_nothing_left(parent)


def test_an_existing_output_is_replaced_only_by_force_and_only_if_it_is_an_export(tiny, tmp_path):
    parent = tmp_path / "exports"
    directory = export_tiny(tiny, parent / "model")
    (directory / "note.txt").write_text("from before")
    with pytest.raises(ConfigError, match="exists; choose another directory, or replace it with --force"):
        export_tiny(tiny, directory)
    assert (directory / "note.txt").exists()
    export_tiny(tiny, directory, force=True)
    assert not (directory / "note.txt").exists()
    assert_nothing_left(parent, "model")

    run = parent / "run"
    run.mkdir()
    (run / "config.json").write_text('{"megatron_ds": {}}')
    with pytest.raises(ConfigError, match="is not a Hugging Face directory, so --force does not replace it"):
        export_tiny(tiny, run, force=True)
    assert_nothing_left(run, "config.json")


def test_a_failed_replacement_leaves_the_old_export(tiny, tmp_path, monkeypatch):
    parent = tmp_path / "exports"
    directory = export_tiny(tiny, parent / "model")
    with pytest.raises(RuntimeError, match="late"), committed(directory, force=True):
        raise RuntimeError("late")
    assert (directory / "model.safetensors").exists()

    rename = Path.rename

    def refuse(self, target):
        if self.name == "export":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match="Permission denied"), committed(directory, force=True):
        pass
    assert (directory / "model.safetensors").exists()
    assert_nothing_left(parent, "model")


def test_an_empty_output_directory_is_used(tiny, tmp_path):
    (tmp_path / "model").mkdir()
    assert (export_tiny(tiny, tmp_path / "model") / "config.json").exists()


def test_a_refused_target_writes_nothing(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--target llama: llama has no query and key norm"):
        export_tiny(tiny, tmp_path / "exports" / "model", target="llama")
    assert not (tmp_path / "exports").exists()


# --- checkpoints that do not hold their model -----------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny.checkpoint.path)
    checkpoint.config["megatron_ds"]["model"] |= {"ffn_hidden_size": 81, "untie_embeddings_and_output_weights": True}
    with pytest.raises(CheckpointError) as error:
        export(checkpoint, tmp_path / "model", ExportOptions())
    assert "output.weight is missing" in str(error.value)
    assert "layers.0.mlp.up.weight is [80, 48], the model's is [81, 48]" in str(error.value)


def test_a_configuration_of_another_version_is_named(tmp_path):
    config = run_config()
    config["megatron_ds"]["model"]["num_wings"] = 2
    CheckpointStore(tmp_path, SingleProcess()).save(1, [], rank_state={}, trainer={}, config=config)
    with pytest.raises(CheckpointError, match=r"config\.json, megatron_ds\.model\.num_wings"):
        export(open_checkpoint(tmp_path), tmp_path / "model", ExportOptions())


# --- command line ---------------------------------------------------------------------------------------------------


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    export_hf.add_arguments(parser)
    return export_hf.run(parser.parse_args(list(map(str, arguments))))


def test_the_command_exports_and_says_who_runs_it(tiny, tmp_path, capsys):
    arguments = ["--load", tiny.checkpoint.path, "--output", tmp_path / "model", "--dtype", "bf16", "--max-shard-size"]
    assert run_command(*arguments, "50KB") == 0
    out = capsys.readouterr().out
    assert f"exported step 7 as qwen3 to {tmp_path / 'model'}\nengines: transformers" in out
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    with pytest.raises(ConfigError, match="--max-shard-size huge"):
        run_command(*arguments, "huge")


def test_the_command_says_when_there_is_no_tokenizer(tmp_path, capsys):
    tiny = save_tiny(tmp_path / "checkpoints")
    assert run_command("--load", tiny.checkpoint.path, "--output", tmp_path / "model") == 0
    assert "note: without a tokenizer" in capsys.readouterr().out
