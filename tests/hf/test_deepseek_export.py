"""deepseek_v3 and deepseek_v2 against the training model, transformers and a slow reference; MTP blocks in every place.

``deepseek_reference.py`` computes from the files alone, so it also says what the MTP blocks in them predict.
"""

import argparse
import json

import pytest
import torch
from deepseek_reference import Reference, main_names, mtp_names
from safetensors.torch import load_file
from tiny_checkpoint import LATENT, MODELS, export_tiny, load_stock, random_tokens, save_tiny
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from megatron_ds.cli import export_hf
from megatron_ds.errors import ConfigError
from megatron_ds.hf.export import mtp_directory

TOLERANCE = 2e-5
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
V3, V2 = MODELS["deepseek_v3"], MODELS["deepseek_v2"]
PLAIN_QUERIES = {"attention": LATENT | {"q_lora_rank": None}}
TIED = {"untie_embeddings_and_output_weights": False}
VARIANTS = {
    "v3, groups": V3,
    "v3, no groups, no dense layer, one shared expert": V3 | PLAIN_QUERIES | {
        "moe": V3["moe"] | {
            "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": 40, "router": {"kind": "sigmoid"},
        },
    },
    "v3, YaRN, two dense layers, no shared expert, no bias, tied": V3 | TIED | {
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        "moe": V3["moe"] | {
            "moe_layer_freq": [0, 0, 1, 1], "moe_shared_expert_intermediate_size": None,
            "router": {"kind": "sigmoid", "fine": "none", "norm_topk_prob": False, "scaling_factor": 2.5},
        },
    },
    "v2, groups": V2,
    "v2, YaRN without mscales, no groups, no dense layer, one shared expert": V2 | PLAIN_QUERIES | {
        "rope_scaling": YARN,
        "moe": V2["moe"] | {
            "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": 40,
            "router": {"kind": "softmax", "fine": "none", "norm_topk_prob": False},
        },
    },
    "v2, YaRN, two dense layers, no shared expert, tied": V2 | TIED | {
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "moe": V2["moe"] | {"moe_layer_freq": [0, 0, 1, 1], "moe_shared_expert_intermediate_size": None},
    },
}  # fmt: skip


def read(directory):
    """config.json and every tensor of a directory."""
    weights = {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}
    return json.loads((directory / "config.json").read_text()), weights


def shapes(weights):
    return {name: list(value.shape) for name, value in weights.items()}


def drafts_of(tiny, token_BS, following_BS):
    """logits of every MTP block, [blocks, B, S, V], as the training model computes them."""
    next_BS = torch.cat((token_BS, following_BS[:, :1]), dim=1)[:, 1:]
    tiny.decoder.train()
    with torch.no_grad():
        logits_BSV = tiny.decoder(token_BS, next_token_BS=next_BS)[..., : tiny.decoder.config.vocab_size]
    tiny.decoder.eval()
    return logits_BSV.unflatten(0, (-1, len(token_BS)))[1:]


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, tmp_path_factory):
    """(tiny model, export directory)."""
    directory = tmp_path_factory.mktemp("variant")
    tiny = save_tiny(directory / "checkpoints", **request.param)
    return tiny, export_tiny(tiny, directory / "model")


# --- the main model -------------------------------------------------------------------------------------------------


def test_transformers_computes_the_training_models_logits(variant):
    tiny, directory = variant
    token_BS = random_tokens()
    for attention in ("eager", "sdpa"):
        with torch.no_grad():
            logits_BSV = load_stock(directory, attention)(token_BS).logits
        assert (logits_BSV - tiny.logits(token_BS)).abs().max() <= TOLERANCE


def test_so_does_the_reference_from_exactly_the_tensors_of_the_family(variant):
    tiny, directory = variant
    config, weights = read(directory)
    assert shapes(weights) == main_names(config)
    token_BS = random_tokens(batch=1)
    logits_SV, _ = Reference(config, weights).logits(token_BS[0], token_BS[0, :0])
    assert (logits_SV - tiny.logits(token_BS)[0]).abs().max() <= TOLERANCE


def test_cached_generation_is_uncached_generation(variant):
    """transformers caches the compressed vectors."""
    stock = load_stock(variant[1])
    prompt_1S = random_tokens(batch=1, length=5)
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}
    options["attention_mask"] = torch.ones_like(prompt_1S)
    cached_1S = stock.generate(prompt_1S, use_cache=True, **options)
    assert torch.equal(cached_1S, stock.generate(prompt_1S, use_cache=False, **options))


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_both_mscales_matter(tmp_path, name):
    """An export that lost one would not pass."""
    model = VARIANTS["v3, YaRN, two dense layers, no shared expert, no bias, tied"]
    tiny = save_tiny(tmp_path / "a", **model)
    other = save_tiny(tmp_path / "b", **model | {"rope_scaling": model["rope_scaling"] | {name: 2.0}})
    token_BS = random_tokens()
    assert (tiny.logits(token_BS) - other.logits(token_BS)).abs().max() > 100 * TOLERANCE


# --- MTP blocks -----------------------------------------------------------------------------------------------------

DRAFTS = {
    "one block": V3 | {"mtp_num_layers": 1},
    "two blocks, tied, no shared expert": V3 | TIED | {
        "mtp_num_layers": 2, "moe": V3["moe"] | {"moe_shared_expert_intermediate_size": None},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=DRAFTS.values(), ids=DRAFTS.keys())
def drafting(request, tmp_path_factory):
    """(tiny model with MTP blocks, export with them inline, export with them beside it)."""
    directory = tmp_path_factory.mktemp("mtp")
    tiny = save_tiny(directory / "checkpoints", **request.param)
    inline = export_tiny(tiny, directory / "inline", mtp="inline")
    return tiny, inline, export_tiny(tiny, directory / "separate")


def test_inline_blocks_are_layers_past_the_last(drafting):
    """No tensor that vLLM asks for is missing, none is left over, and all have the values of training."""
    tiny, inline, _ = drafting
    config, weights = read(inline)
    blocks = tiny.decoder.config.mtp_num_layers
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (4, blocks)
    assert shapes(weights) == main_names(config) | mtp_names(config)
    for block in range(blocks):
        layer = f"model.layers.{4 + block}."
        assert torch.equal(weights[layer + "embed_tokens.weight"], weights["model.embed_tokens.weight"])
        assert torch.equal(weights[layer + "shared_head.head.weight"], weights["lm_head.weight"])


def test_transformers_leaves_inline_blocks_alone(drafting):
    tiny, inline, _ = drafting
    config, _ = read(inline)
    model, loading = AutoModelForCausalLM.from_pretrained(inline, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    layers = {int(name.split(".")[2]) for name in loading["unexpected_keys"]}
    assert layers == set(range(4, 4 + config["num_nextn_predict_layers"]))
    token_BS = random_tokens()
    with torch.no_grad():
        assert (model(token_BS).logits - tiny.logits(token_BS)).abs().max() <= TOLERANCE


def test_separate_blocks_are_the_same_tensors_beside_a_plain_model(drafting):
    tiny, inline, separate = drafting
    _, together = read(inline)
    config, weights = read(separate)
    draft_config, draft_weights = read(mtp_directory(separate))
    assert config["num_nextn_predict_layers"] == 0 and config["architectures"] == ["DeepseekV3ForCausalLM"]
    own = {"num_nextn_predict_layers": tiny.decoder.config.mtp_num_layers, "architectures": ["DeepSeekMTPModel"]}
    assert draft_config == config | own
    assert shapes(weights) == main_names(config) and shapes(draft_weights) == mtp_names(draft_config)
    both = weights | draft_weights
    assert both.keys() == together.keys() and all(torch.equal(both[name], together[name]) for name in both)
    assert load_stock(separate) is not None, "loads with no key missing and none unexpected"
    assert "the draft model of `separate`" in (mtp_directory(separate) / "README.md").read_text()
    assert f"{tiny.decoder.config.mtp_num_layers}, in separate-mtp" in (separate / "README.md").read_text()


def test_blocks_predict_what_they_did_in_training(drafting):
    tiny, inline, _ = drafting
    config, weights = read(inline)
    blocks = config["num_nextn_predict_layers"]
    token_BS = random_tokens(length=23 + blocks)
    token_BS, following_BS = token_BS[:, :23], token_BS[:, 23:]
    drafts_KBSV = drafts_of(tiny, token_BS, following_BS)
    assert len(drafts_KBSV) == blocks
    for row in range(2):
        logits_SV, expected = Reference(config, weights).logits(token_BS[row], following_BS[row])
        assert (tiny.logits(token_BS)[row] - logits_SV).abs().max() <= TOLERANCE
        for block, draft_SV in enumerate(expected):
            known = 23 - block  # training sees one token past the sequence, so block k knows token i + k up to here
            assert (drafts_KBSV[block, row, :known] - draft_SV[:known]).abs().max() <= TOLERANCE


def test_dropped_blocks_leave_no_trace(drafting, tmp_path):
    tiny, _, separate = drafting
    directory = export_tiny(tiny, tmp_path / "model", mtp="drop")
    (config, weights), (plain_config, plain) = read(directory), read(separate)
    assert config == plain_config and weights.keys() == plain.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert f"{tiny.decoder.config.mtp_num_layers}, left out" in (directory / "README.md").read_text()


def test_blocks_are_streamed_like_the_rest(drafting, tmp_path):
    """Shards hold no more than asked, and copies are read one by one."""
    tiny, inline, _ = drafting
    directory = export_tiny(tiny, tmp_path / "model", mtp="inline", max_shard_size=60_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in index.items() if name.startswith("model.layers.4.")}) > 1
    (_, weights), (_, expected) = read(directory), read(inline)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_both_directories_appear_or_neither(drafting, tmp_path):
    tiny, _, _ = drafting
    stale = mtp_directory(tmp_path / "model")
    stale.mkdir()
    (stale / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="model-mtp: exists; choose another directory"):
        export_tiny(tiny, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model-mtp"]
    with pytest.raises(ConfigError, match="model-mtp: is not a Hugging Face directory"):
        export_tiny(tiny, tmp_path / "model", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model-mtp"]
    (stale / "config.json").write_text('{"model_type": "deepseek_v3"}')
    export_tiny(tiny, tmp_path / "model", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-mtp"]
    assert not (stale / "note.txt").exists()


def test_deepseek_v2_has_no_place_for_blocks(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints", **V2, mtp_num_layers=1)
    with pytest.raises(ConfigError, match="--mtp inline: deepseek_v2 has no place for MTP blocks"):
        export_tiny(tiny, tmp_path / "exports" / "model", mtp="inline")
    directory = export_tiny(tiny, tmp_path / "exports" / "model")
    config, weights = read(directory)
    assert shapes(weights) == main_names(config) and [p.name for p in directory.parent.iterdir()] == ["model"]


def test_other_families_leave_blocks_out(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["qwen3"], mtp_num_layers=1)
    directory = export_tiny(tiny, tmp_path / "exports" / "model")
    token_BS = random_tokens()
    with torch.no_grad():
        assert (load_stock(directory)(token_BS).logits - tiny.logits(token_BS)).abs().max() <= TOLERANCE
    assert not any("layers.4" in name for name in read(directory)[1])


@pytest.mark.parametrize(
    ("place", "said"), [("auto", "in {}-mtp"), ("inline", "in the same files"), ("drop", "left out")]
)
def test_the_command_says_where_blocks_are(drafting, tmp_path, capsys, place, said):
    tiny, _, _ = drafting
    parser, output = argparse.ArgumentParser(), tmp_path / "model"
    export_hf.add_arguments(parser)
    arguments = ["--load", tiny.checkpoint.path, "--output", output, "--mtp", place]
    assert export_hf.run(parser.parse_args(list(map(str, arguments)))) == 0
    blocks = tiny.decoder.config.mtp_num_layers
    assert f"blocks of multi-token prediction ({blocks}): {said.format(output)}\n" in capsys.readouterr().out


def test_the_card_tells_latent_attention(variant):
    card = (variant[1] / "README.md").read_text()
    queries = variant[0].decoder.config.attention.q_lora_rank
    channels = "latent, keys and values from 20 channels" + (f", queries from {queries}" if queries else "")
    assert f"| Attention | {channels} |" in card
    assert "| Heads x widths (query and key, value) | 4 x (10 + 6 rotary, 14) |" in card


# --- at the depth that transformers knows ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(tiny model of 61 layers and one MTP block, its export)."""
    directory = tmp_path_factory.mktemp("deep")
    moe = V3["moe"] | {"moe_layer_freq": [0] * 58 + [1] * 3}
    sizes = {"num_layers": 61, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "mtp_num_layers": 1}
    tiny = save_tiny(directory / "checkpoints", **V3 | sizes | {"moe": moe})
    return tiny, export_tiny(tiny, directory / "model")


def test_blocks_are_inline_at_61_layers_and_load_without_a_word(deep):
    config, weights = read(deep[1])
    assert config["num_nextn_predict_layers"] == 1
    assert shapes(weights) == main_names(config) | mtp_names(config)
    load_stock(deep[1])


def test_the_block_that_transformers_builds_is_the_training_models(deep):
    tiny, directory = deep
    model, token_BS = load_stock(directory), random_tokens()
    block = MtpModel.from_pretrained(model).eval()
    next_BS = torch.roll(token_BS, -1, 1)
    position_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS)
    with torch.no_grad():
        hidden_BSD = model.model(token_BS).last_hidden_state
        cache = MtpCache(config=model.config.get_mtp_config())
        hidden_BSD = block.forward_layer(0, hidden_BSD, position_BS, cache, input_ids=next_BS)
        expected_BSV = model.lm_head(hidden_BSD)
    (draft_BSV,) = drafts_of(tiny, token_BS, next_BS[:, -1:])
    limit = TOLERANCE * max(1.0, expected_BSV.abs().max().item())
    assert (draft_BSV - expected_BSV).abs().max() <= limit


def test_transformers_drafts_with_it(deep):
    """generate(use_mtp=True) gives the tokens of plain generation."""
    stock, prompt_1S = load_stock(deep[1]), random_tokens(batch=1, length=5)
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(prompt_1S)}
    assert torch.equal(stock.generate(prompt_1S, use_mtp=True, **options), stock.generate(prompt_1S, **options))


# --- precision and proof --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "blocks", "mtp"), [("deepseek_v3", 1, "inline"), ("deepseek_v2", 0, "auto")])
def test_sixteen_bits_keep_the_router_in_fp32(tmp_path, family, blocks, mtp):
    """In MTP blocks as well."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[family], mtp_num_layers=blocks)
    directory = export_tiny(tiny, tmp_path / "model", precision="bf16", mtp=mtp)
    dtypes = {name: value.dtype for name, value in read(directory)[1].items()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
    assert any(name.startswith("model.layers.4.mlp.gate.") for name in dtypes) is bool(blocks)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    with torch.no_grad():
        assert torch.isfinite(model(random_tokens()).logits).all()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek_v3", {"mtp": "inline"}),
        ("deepseek_v3", {"precision": "bf16"}),
        ("deepseek_v2", {"precision": "bf16"}),
    ],
)
def test_an_export_proves_itself(tmp_path, family, options):
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[family], mtp_num_layers=1)
    directory = export_tiny(tiny, tmp_path / "model", verify=True, **options)
    checks = {check["name"]: check for check in json.loads((directory / "export_report.json").read_text())["checks"]}
    assert {"weights", "logits, eager", "logits, sdpa and grouped_mm", "greedy generation"} <= checks.keys()
    blocks = "; 1 MTP block(s), which other engines read" if "mtp" in options else ""
    assert checks["weights"]["detail"] == "0 missing, 0 unexpected" + blocks
