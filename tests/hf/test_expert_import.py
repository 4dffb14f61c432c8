"""ernie4_5_moe, qwen3_moe and mixtral as transformers makes and saves them, read into our decoder and written again."""

import pytest
import torch
from importing import difference, edit_tensors, imported, save_stock, stock_fixture
from reexporting import reexport, same_bytes, tensors_of
from tiny_checkpoint import MODELS, export_tiny, random_tokens, save_tiny

from megatron_ds.errors import CheckpointError
from megatron_ds.hf.targets import EXPERT_TARGETS

TOLERANCE = 2e-5
WINDOW = 6
"""Tokens that a sliding layer sees; the sequences are longer."""
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
ERNIE = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
VARIANTS = {
    "ernie, dense prefix, two shared experts, tied": ("ernie4_5_moe", ERNIE),
    "ernie, every second layer of a range, no shared expert, untied": (
        "ernie4_5_moe",
        ERNIE | {
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 2, "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
    ),
    "ernie, all layers, extended context": (
        "ernie4_5_moe",
        ERNIE | {"moe_layer_start_index": 0, "moe_num_shared_experts": 1, "rope_parameters": LLAMA3},
    ),
    "qwen, weights as they are": ("qwen3_moe", QWEN | {"rope_parameters": LLAMA3}),
    "qwen, normalised, some layers dense": (
        "qwen3_moe", QWEN | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen, a window, tied": (
        "qwen3_moe",
        QWEN | {"use_sliding_window": True, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "mixtral, a window, odd sizes": (
        "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW, "head_dim": 10},
    ),
}  # fmt: skip


stock = stock_fixture(VARIANTS)


def test_our_decoder_computes_the_stock_models_logits(stock):
    _, directory, model = stock
    assert any(".experts.4." in name for name in tensors_of(directory)), "one by one on disk"
    assert difference(model, imported(directory), random_tokens()) <= TOLERANCE


def test_written_again_it_is_the_same_file(stock, tmp_path):
    _, directory, _ = stock
    assert same_bytes(tensors_of(reexport(directory, tmp_path)), tensors_of(directory))


@pytest.mark.parametrize("name", ["ernie, dense prefix, two shared experts, tied", "qwen, a window, tied", "mixtral"])
def test_so_it_is_in_bf16(name, tmp_path):
    """Also what a family loads in fp32 and the files have in 16 bits."""
    family, settings = VARIANTS[name]
    save_stock(tmp_path / "stock", family, dtype=torch.bfloat16, **settings)
    once = reexport(tmp_path / "stock", tmp_path / "once")
    after = tensors_of(once)
    assert same_bytes(after, tensors_of(tmp_path / "stock"))
    assert same_bytes(tensors_of(reexport(once, tmp_path / "twice")), after)


@pytest.mark.parametrize("family", [target.model_type for target in EXPERT_TARGETS])
def test_what_we_have_exported_comes_back_bit_by_bit(family, tmp_path):
    """Also our own family, and what a model has not and its family has: both times it is zeros."""
    tiny = save_tiny(tmp_path / "trained", **MODELS[family])
    before = export_tiny(tiny, tmp_path / "before")
    assert same_bytes(tensors_of(reexport(before, tmp_path / "after")), tensors_of(before))
    rounded = export_tiny(tiny, tmp_path / "rounded", precision="bf16")
    once = reexport(rounded, tmp_path / "once")
    assert same_bytes(tensors_of(once), tensors_of(rounded))
    assert same_bytes(tensors_of(reexport(once, tmp_path / "twice")), tensors_of(once))
    found, vocabulary = imported(before).state_dict(), tiny.decoder.config.vocab_size
    for name, weight in tiny.decoder.state_dict().items():
        rows = slice(vocabulary if name in ("embedding.weight", "output.weight") else None)
        assert ".balance." in name or torch.equal(found[name][rows], weight[rows]), name


@pytest.mark.parametrize("family", ["ernie4_5_moe", "qwen3_moe", "mixtral"])
def test_experts_stacked_on_disk(family, tmp_path):
    """transformers can save what it has in memory: all experts of a layer in one tensor, under other names."""
    settings = {"ernie4_5_moe": ERNIE, "qwen3_moe": QWEN, "mixtral": {"num_local_experts": 6}}[family]
    model = save_stock(tmp_path / "classic", family, **settings)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stacked = tensors_of(tmp_path / "stacked")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in stacked)
    assert not any(".experts.0." in name for name in stacked)
    assert same_bytes(imported(tmp_path / "stacked").state_dict(), imported(tmp_path / "classic").state_dict())


def test_a_missing_expert_is_named(tmp_path):
    save_stock(tmp_path, "mixtral", num_local_experts=4)
    edit_tensors(tmp_path, model__layers__2__block_sparse_moe__experts__3__w3__weight=None)
    with pytest.raises(CheckpointError, match=r"layers\.2\.block_sparse_moe\.experts\.3\.w3\.weight is missing"):
        imported(tmp_path)
