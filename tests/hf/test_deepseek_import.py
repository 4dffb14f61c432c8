"""deepseek_v3 and deepseek_v2 as transformers saves them, and as they are published: in FP8, with MTP blocks."""

import json

import pytest
import torch
from deepseek_reference import Reference
from importing import difference, edit_config, imported, save_stock, stock_fixture
from reexporting import reexport, same_bytes, tensors_of
from safetensors.torch import save_file
from tiny_checkpoint import MODELS, export_tiny, random_tokens, save_tiny

from megatron_ds.hf.reader import open_hugging_face

TOLERANCE = 2e-5
SIZES = {
    "num_key_value_heads": 4, "head_dim": 6, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 14, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 2}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
VARIANTS = {
    "v3, groups, one dense layer": ("deepseek_v3", SIZES | GROUPS | {"first_k_dense_replace": 1}),
    "v3, plain queries, YaRN, no groups, no dense layer, two shared experts, not normalised": (
        "deepseek_v3",
        SIZES | {
            "q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
            "norm_topk_prob": False, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "v2, groups, one dense layer, scaled": (
        "deepseek_v2",
        SIZES | GROUPS | {
            "topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "routed_scaling_factor": 4.0,
        },
    ),
    "v2, plain queries, YaRN without mscales, greedy, three dense layers": (
        "deepseek_v2", SIZES | {"q_lora_rank": None, "first_k_dense_replace": 3, "rope_parameters": YARN},
    ),
}  # fmt: skip
HALVES = SIZES | GROUPS | {"first_k_dense_replace": 2, "rope_interleave": False}


stock = stock_fixture(VARIANTS)


def test_our_decoder_computes_the_stock_models_logits(stock):
    _, directory, model = stock
    assert difference(model, imported(directory), random_tokens()) <= TOLERANCE


def test_written_again_it_is_the_same_file(stock, tmp_path):
    _, directory, _ = stock
    assert same_bytes(tensors_of(reexport(directory, tmp_path)), tensors_of(directory))


@pytest.mark.parametrize("name", ["v3, groups, one dense layer", "v2, groups, one dense layer, scaled"])
def test_so_it_is_in_bf16(name, tmp_path):
    """Also what a family loads in fp32 and the files have in 16 bits."""
    family, settings = VARIANTS[name]
    save_stock(tmp_path / "stock", family, dtype=torch.bfloat16, **settings)
    once = reexport(tmp_path / "stock", tmp_path / "once")
    after = tensors_of(once)
    assert same_bytes(after, tensors_of(tmp_path / "stock"))
    assert same_bytes(tensors_of(reexport(once, tmp_path / "twice")), after)


def test_rotary_channels_half_a_head_apart(tmp_path):
    """What few directories have: a model of its own convention here, or turned into the usual one."""
    model = save_stock(tmp_path, "deepseek_v3", **HALVES)
    for interleaved in (False, True):
        decoder = imported(tmp_path, rotary_interleaved=interleaved)
        assert decoder.config.rotary_interleaved == interleaved
        assert difference(model, decoder, random_tokens()) <= TOLERANCE


def test_linear_interpolation(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = save_stock(tmp_path, "deepseek_v2", **SIZES, rope_parameters=rope)
    assert difference(model, imported(tmp_path), random_tokens()) <= TOLERANCE


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_experts_stacked_on_disk(family, tmp_path):
    model = save_stock(tmp_path / "classic", family, **SIZES | GROUPS | {"first_k_dense_replace": 1})
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in tensors_of(tmp_path / "stacked"))
    assert same_bytes(imported(tmp_path / "stacked").state_dict(), imported(tmp_path / "classic").state_dict())


# --- MTP blocks -----------------------------------------------------------------------------------------------------


def test_a_block_that_is_declared_and_not_there(tmp_path):
    """transformers declares one whatever it saves."""
    save_stock(tmp_path, "deepseek_v3", **VARIANTS["v3, groups, one dense layer"][1])
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert open_hugging_face(tmp_path).model.mtp_num_layers == 0


def test_blocks_inline_come_back_bit_by_bit(tmp_path):
    tiny = save_tiny(tmp_path / "trained", **MODELS["deepseek_v3"] | {"mtp_num_layers": 2})
    before = export_tiny(tiny, tmp_path / "before", mtp="inline")
    assert open_hugging_face(before).model.mtp_num_layers == 2
    assert same_bytes(tensors_of(reexport(before, tmp_path / "after", mtp="inline")), tensors_of(before))
    rounded = export_tiny(tiny, tmp_path / "rounded", precision="bf16", mtp="inline")
    once = reexport(rounded, tmp_path / "once", mtp="inline")
    assert same_bytes(tensors_of(once), tensors_of(rounded))
    assert same_bytes(tensors_of(reexport(once, tmp_path / "twice", mtp="inline")), tensors_of(once))


def test_blocks_predict_as_the_files_say(tmp_path):
    """An independent reading of the directory and our decoder, filled from it, agree on every head."""
    tiny = save_tiny(tmp_path / "trained", **MODELS["deepseek_v3"] | {"mtp_num_layers": 1})
    directory = export_tiny(tiny, tmp_path / "model", mtp="inline")
    config, token_S = json.loads((directory / "config.json").read_text()), random_tokens(batch=1, length=9)[0]
    main_SV, drafts = Reference(config, tensors_of(directory)).logits(token_S[:-1], token_S[-1:])
    decoder = imported(directory).train()
    with torch.no_grad():
        logits_HSV = decoder(token_S[None, :-1], next_token_BS=token_S[None, 1:])[..., : decoder.config.vocab_size]
    assert (logits_HSV[0] - main_SV).abs().max() <= TOLERANCE
    assert (logits_HSV[1] - drafts[0]).abs().max() <= TOLERANCE


# --- FP8 --------------------------------------------------------------------------------------------------------------


BLOCK = 16
"""Side of a block with a factor of its own; the official 128 would leave every tiny matrix one."""


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, the factors of their blocks, and what they stand for; block by block, those at the edges smaller."""
    rows, columns = (range(0, size, BLOCK) for size in weight.shape)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    factors, meant = torch.empty(len(rows), len(columns)), torch.empty_like(weight)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = slice(row, row + BLOCK), slice(column, column + BLOCK)
            factors[i, j] = weight[at].abs().max() / 448
            values[at] = (weight[at] / factors[i, j]).to(torch.float8_e4m3fn)
            meant[at] = values[at].float() * factors[i, j]
    return values, factors, meant


def test_fp8_weights_are_their_values_times_the_factors_of_their_blocks(tmp_path):
    """As the official files are: matrices in FP8, but for embedding, output and routers."""
    settings = VARIANTS["v3, groups, one dense layer"][1]
    model = save_stock(tmp_path / "plain", "deepseek_v3", **settings)
    model.save_pretrained(tmp_path / "fp8")
    plain, fp8 = tensors_of(tmp_path / "plain"), {}
    for name, weight in list(plain.items()):
        if weight.dim() == 2 and "_proj" in name:
            fp8[name], fp8[name + "_scale_inv"], plain[name] = quantized(weight)
        else:
            fp8[name] = weight
    assert any("_scale_inv" in name and factors.shape == (3, 3) for name, factors in fp8.items())
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    save_file(fp8, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(tmp_path / "fp8", quantization_config=said)
    assert same_bytes(imported(tmp_path / "fp8").state_dict(), imported(tmp_path / "plain").state_dict())
