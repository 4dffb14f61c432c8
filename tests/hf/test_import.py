"""Hugging Face -> checkpoint -> Hugging Face: no bit changes on the way, and the checkpoint is one like any other."""

import json

import pytest
import torch
from importing import edit_config, imported, save_stock
from safetensors.torch import load_file, save_file
from tiny_checkpoint import MODELS, export_tiny, load_stock, random_tokens, save_tiny

from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.errors import CheckpointError, ConfigError, DataError
from megatron_ds.hf import import_model as module
from megatron_ds.hf.decoder import load_decoder, read_config
from megatron_ds.hf.export import export
from megatron_ds.hf.import_model import import_model
from megatron_ds.hf.options import ExportOptions
from megatron_ds.parallel.random import set_generator_state

MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
FAMILIES = {
    "llama": {"hidden_size": 64},
    "qwen3": MIXED | {"use_sliding_window": True, "tie_word_embeddings": True},
    "cwm": MIXED,
}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def same_files(one, other):
    """Whether two directories hold the same tensors in the same number formats, bit by bit."""
    left, right = (load_file(directory / "model.safetensors") for directory in (one, other))
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, tokenizer_directory):
    """(Hugging Face directory with a tokenizer, what importing it to ``.../checkpoints`` returned)."""
    directory = tmp_path_factory.mktemp("qwen3")
    save_stock(directory / "model", "qwen3", dtype=torch.bfloat16, **FAMILIES["qwen3"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "model" / name).write_bytes((tokenizer_directory / name).read_bytes())
    return directory / "model", import_model(directory / "model", directory / "checkpoints")


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_comes_back_bit_by_bit(tmp_path, family, precision):
    """In the number format of its files, without a word about it."""
    save_stock(tmp_path / "stock", family, dtype=FORMATS[precision], **FAMILIES[family])
    found = import_model(tmp_path / "stock", tmp_path / "checkpoints")
    assert found.model_type == family and found.path == tmp_path / "checkpoints" / "global_step0"
    export(open_checkpoint(found.path), tmp_path / "back", ExportOptions(target=family))
    assert same_files(tmp_path / "stock", tmp_path / "back")


@pytest.mark.parametrize("family", ["mds_dense", "llama"])
def test_what_we_have_trained_comes_back_bit_by_bit(tmp_path, family):
    model = MODELS[family] | {"rotary_interleaved": family == "mds_dense", "untie_embeddings_and_output_weights": True}
    before = export_tiny(save_tiny(tmp_path / "trained", **model), tmp_path / "before")
    import_model(before, tmp_path / "checkpoints")
    export(open_checkpoint(tmp_path / "checkpoints"), tmp_path / "after", ExportOptions(target=family))
    assert same_files(before, tmp_path / "after")
    assert json.loads((before / "config.json").read_text()) == json.loads((tmp_path / "after/config.json").read_text())


def test_the_checkpoint_is_one_like_any_other(qwen3):
    directory, found = qwen3
    assert found.notes == []
    checkpoint = open_checkpoint(directory.parent / "checkpoints")
    assert (checkpoint.step, checkpoint.rejected) == (0, [])
    assert checkpoint.trainer["consumed_samples"] == 0 and checkpoint.trainer["engine"]["optimizer"] == {}
    set_generator_state(checkpoint.rank_state(0), torch.device("cpu"))
    run = read_config(checkpoint)
    model = run.megatron_ds.model
    assert (run.dtype_name, run.train_batch_size, run.megatron_ds.data.eod_id) == ("bf16", 1, 0)
    assert (model.num_layers, model.attention.window, model.seq_length) == (4, 5, 64)
    assert run.megatron_ds.generation == "v1"
    assert sorted(path.name for path in (checkpoint.path / "tokenizer").iterdir()) == [
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    token_BS = random_tokens()
    with torch.no_grad():
        logits_BSV = load_decoder(checkpoint)(token_BS)[..., :301]
        assert (load_stock(directory)(token_BS).logits - logits_BSV).abs().max() <= 2e-5


def test_weights_in_stretches_and_many_files_are_the_same(qwen3, tmp_path, monkeypatch):
    """The checkpoint says nothing about how it was cut, and no more than a stretch is read at once."""
    directory, found = qwen3
    monkeypatch.setattr(module, "STRETCH", 1000)
    monkeypatch.setattr(module, "MIN_FILE_BYTES", 10_000)
    read, original = [], module.HuggingFaceWeights.read_range

    def watched(*arguments):
        read.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(module.HuggingFaceWeights, "read_range", watched)
    cut = open_checkpoint(import_model(directory, tmp_path / "cut").path)
    assert len(list(cut.path.glob("shard_*"))) > 20
    assert sum(read) == found.parameters and max(read) == 1000
    whole = load_decoder(open_checkpoint(found.path)).state_dict()
    assert all(torch.equal(cut.read(name), weight) for name, weight in whole.items())


def test_experts_come_with_their_generation(tmp_path):
    save_stock(tmp_path / "stock", "mixtral", num_local_experts=4)
    run = read_config(open_checkpoint(import_model(tmp_path / "stock", tmp_path / "checkpoints").path))
    assert (run.megatron_ds.generation, run.megatron_ds.moe.num_experts) == ("v2", 4)


def test_a_tokenizer_that_we_cannot_read_is_left_behind_with_a_word(tmp_path):
    save_stock(tmp_path / "stock", "llama", eos_token_id=[7, 8])
    (tmp_path / "stock" / "tokenizer.model").write_bytes(b"a SentencePiece model")
    found = import_model(tmp_path / "stock", tmp_path / "checkpoints")
    assert len(found.notes) == 1 and found.notes[0].startswith("without a tokenizer: ")
    assert not (found.path / "tokenizer").exists()
    assert read_config(open_checkpoint(found.path)).megatron_ds.data.eod_id == 7


def test_a_tokenizer_that_is_given_must_be_right(tmp_path, tokenizer_directory):
    save_stock(tmp_path / "stock", "llama", vocab_size=200)
    with pytest.raises(DataError, match=r"tokenizer\.json: not found"):
        import_model(tmp_path / "stock", tmp_path / "checkpoints", tmp_path)
    with pytest.raises(ConfigError, match="lies outside the model's vocabulary of 200"):
        import_model(tmp_path / "stock", tmp_path / "checkpoints", tokenizer_directory)
    assert not (tmp_path / "checkpoints").exists()


def test_documents_need_an_end(tmp_path, tokenizer_directory):
    save_stock(tmp_path / "stock", "llama")
    edit_config(tmp_path / "stock", eos_token_id=None)
    with pytest.raises(ConfigError, match=r"has no eos_token_id, and there is no tokenizer"):
        import_model(tmp_path / "stock", tmp_path / "checkpoints")
    found = import_model(tmp_path / "stock", tmp_path / "checkpoints", tokenizer_directory)
    assert read_config(open_checkpoint(found.path)).megatron_ds.data.eod_id == 0


def test_nothing_is_overwritten(tmp_path):
    save_stock(tmp_path / "stock", "llama")
    import_model(tmp_path / "stock", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="exists; choose another directory"):
        import_model(tmp_path / "stock", tmp_path / "checkpoints")


def test_a_pickled_model(tmp_path):
    save_stock(tmp_path / "stock", "llama")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    before = imported(tmp_path / "stock").state_dict()
    (tmp_path / "stock" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "stock" / "pytorch_model.bin")
    found = open_checkpoint(import_model(tmp_path / "stock", tmp_path / "checkpoints").path)
    assert all(torch.equal(found.read(name), weight) for name, weight in before.items())


def test_weights_that_are_missing_leave_nothing_behind(tmp_path):
    save_stock(tmp_path / "stock", "llama")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "stock" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is missing"):
        import_model(tmp_path / "stock", tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
