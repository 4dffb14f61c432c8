"""Generation from a checkpoint and from Hugging Face directories: same tokens, honest errors, no foreign code."""

import argparse
import json

import pytest
import torch
from tiny_checkpoint import MODELS, export_tiny, save_tiny, train_tokenizer

from megatron_ds.cli import generate as command
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.inference.generate import generate, hugging_face_directory, load
from megatron_ds.inference.sampling import Sampling

PROMPT = "The window"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A soft-gate checkpoint with its tokenizer: the model that needs our own code."""
    root = tmp_path_factory.mktemp("generate")
    return save_tiny(root / "checkpoints", tokenizer=train_tokenizer(root / "tokenizer"), **MODELS["mds_dense"])


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """Its export."""
    return export_tiny(tiny, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def loaded(exported):
    """Model and tokenizer of the export."""
    return load(exported)


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, arguments))))


def test_a_checkpoint_and_its_export_say_the_same(tiny, exported, capsys):
    texts = []
    for place in (tiny.checkpoint.path.parent, exported):
        assert run_command("--load", place, "--prompt", PROMPT, "--max-new-tokens", 12, "--num-samples", 2) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"--- sample 1 of 2 ---\n{PROMPT}") and f"--- sample 2 of 2 ---\n{PROMPT}" in texts[0]


def test_greedy_is_the_training_models_argmax(tiny, loaded):
    (text,) = generate(*loaded, PROMPT, Sampling(max_new_tokens=10, temperature=0))
    tokenizer = loaded[1]
    ids = tokenizer(PROMPT).input_ids
    for _ in range(10):
        ids.append(int(tiny.logits(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == 0:
            break
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_seed_cache_and_filters(loaded):
    def draw(**settings):
        return list(generate(*loaded, PROMPT, Sampling(max_new_tokens=12, **settings)))

    assert draw(seed=1, num_samples=2) == draw(seed=1, num_samples=2)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1)[0] == draw(seed=1, num_samples=2)[0]
    assert draw(seed=1) == draw(seed=1, use_cache=False)
    greedy = draw(temperature=0)
    assert draw(top_k=1) == draw(top_p=1e-6) == greedy != draw(temperature=5.0)


def test_an_empty_prompt_starts_a_document(loaded):
    (text,) = generate(*loaded, "", Sampling(max_new_tokens=5))
    assert isinstance(text, str)


def test_going_beyond_the_positions_is_said(loaded, capsys):
    next(generate(*loaded, PROMPT, Sampling(max_new_tokens=64)))
    assert "note: prompt and new tokens may go beyond the 64 positions" in capsys.readouterr().err


def test_live_prints_the_tokens_as_they_come(loaded, capsys):
    (text,) = generate(*loaded, PROMPT, Sampling(max_new_tokens=8), live=True)
    assert capsys.readouterr().out == text + "\n"


def test_all_bad_settings_are_reported_together():
    with pytest.raises(ConfigError) as error:
        Sampling(max_new_tokens=0, temperature=-1.0, top_k=0, top_p=1.5, num_samples=0)
    assert [part.split()[0] for part in str(error.value).split("; ")] == [
        "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--num-samples",
    ]  # fmt: skip


def test_foreign_code_is_never_executed(exported, tmp_path):
    """Neither of an unknown family nor hidden in a directory that claims to be ours."""
    evil = f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit\n"
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("modeling_mds_dense.py", "configuration_mds_dense.py"):
        (tmp_path / name).write_text(evil)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(evil)
    assert list(generate(*load(tmp_path), PROMPT, Sampling(max_new_tokens=3)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    with pytest.raises(ConfigError, match="foreign would need code from the directory"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_model_with_experts_runs_the_code_of_the_package(tmp_path):
    tiny = save_tiny(tmp_path / "c", tokenizer=train_tokenizer(tmp_path / "tokenizer"), **MODELS["mds_moe"])
    model, tokenizer = load(export_tiny(tiny, tmp_path / "model"))
    assert type(model).__module__ == "megatron_ds.hf.remote_code.modeling_mds_moe"
    [text] = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=1, temperature=0.0))
    ids = tokenizer(PROMPT).input_ids
    best = tiny.logits(torch.tensor([ids]))[0, -1].argmax().item()
    assert text == tokenizer.decode([*ids, best], skip_special_tokens=True)


def test_missing_parts_are_named(exported, tmp_path):
    with pytest.raises(CheckpointError), hugging_face_directory(tmp_path):
        pass
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"13 weights are missing, the first is model\.layers\.4\."):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        load(tmp_path)
