"""Every target against the training model, in fp32, through stock transformers: logits, windows, generation."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import (
    FULL,
    HYBRID,
    LENGTH,
    MODELS,
    SOFT_GATE,
    WINDOW,
    export_tiny,
    load_stock,
    random_tokens,
    save_tiny,
)

TOLERANCE = 2e-5
ROPE = {
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with its own attention factor": {
        "kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 0.7,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(target, tiny model, export directory) of each target."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny = save_tiny(directory / "checkpoints", **MODELS[request.param])
    return request.param, tiny, export_tiny(tiny, directory / "model", target=request.param)


def largest_difference(tiny, directory, attention="eager"):
    """Largest |logit difference| on sequences longer than the window."""
    token_BS = random_tokens()
    with torch.no_grad():
        logits_BSV = load_stock(directory, attention)(token_BS).logits
    assert logits_BSV.shape == (*token_BS.shape, 301), "the padding of the vocabulary is cut"
    return (logits_BSV - tiny.logits(token_BS)).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_the_training_model(exported, attention):
    target, tiny, directory = exported
    assert json.loads((directory / "config.json").read_text())["model_type"] == target
    assert largest_difference(tiny, directory, attention) <= TOLERANCE


@pytest.mark.parametrize(
    "model",
    [
        {"attention": SOFT_GATE, "qk_layernorm": False, "untie_embeddings_and_output_weights": True},
        {"attention": HYBRID | {"pattern": "L"}, "untie_embeddings_and_output_weights": True, "num_query_groups": 4},
        {"attention": FULL, "num_query_groups": 1, "hidden_size": 50, "norm_epsilon": 1e-3},
        {"attention": HYBRID | {"pattern": "L", "window": 1}, "qk_layernorm": False},
        {"attention": SOFT_GATE, "rotary_interleaved": True},
    ],
    ids=[
        "untied gate without query/key norm",
        "untied, all layers local",
        "one key head, odd width",
        "window 1",
        "interleaved gate",
    ],
)
def test_logits_of_other_shapes(tmp_path, model):
    tiny = save_tiny(tmp_path / "checkpoints", **model)
    assert largest_difference(tiny, export_tiny(tiny, tmp_path / "model")) <= TOLERANCE


@pytest.mark.parametrize("scaling", ROPE.values(), ids=ROPE.keys())
@pytest.mark.parametrize("target", ["qwen3", "cwm", "mds_dense", "ernie4_5_moe", "mds_moe"])
def test_every_context_extension_arrives(tmp_path, target, scaling):
    """The extension changes the logits by far more than the tolerance, and the export by as much."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[target], rope_scaling=scaling)
    assert largest_difference(tiny, export_tiny(tiny, tmp_path / "model")) <= TOLERANCE
    plain = save_tiny(tmp_path / "plain", **MODELS[target])
    token_BS = random_tokens()
    assert (plain.logits(token_BS) - tiny.logits(token_BS)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("target", ["qwen3", "cwm"])
def test_window_edge(tmp_path, target):
    """One local layer: the key at distance W matters to a query, the key at distance W + 1 does not."""
    model = MODELS[target] | {"attention": HYBRID | {"pattern": "L"}, "num_layers": 1}
    stock = load_stock(export_tiny(save_tiny(tmp_path / "checkpoints", **model), tmp_path / "model"))
    query, token_1S = LENGTH - 1, random_tokens(batch=1)
    with torch.no_grad():
        before_V = stock(token_1S).logits[0, query]
        for distance, matters in ((WINDOW, True), (WINDOW + 1, False)):
            changed_1S = token_1S.clone()
            changed_1S[0, query - distance] += 1
            assert torch.equal(stock(changed_1S).logits[0, query], before_V) is not matters


def test_soft_gate_edge(tmp_path):
    """With its gates shut, one soft-gate layer is a local layer: W matters, W + 1 does not."""
    tiny = save_tiny(tmp_path / "checkpoints", attention=SOFT_GATE, num_layers=1)
    stock = load_stock(export_tiny(tiny, tmp_path / "model"))
    query, token_1S = LENGTH - 1, random_tokens(batch=1)
    gate = stock.model.layers[0].self_attn.far_gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.fill_(-1e4)
        before_V = stock(token_1S).logits[0, query]
        for distance, matters in ((WINDOW, True), (WINDOW + 1, False)):
            changed_1S = token_1S.clone()
            changed_1S[0, query - distance] = (changed_1S[0, query - distance] + 1) % 301
            assert torch.equal(stock(changed_1S).logits[0, query], before_V) is not matters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_generation_is_uncached_generation(exported, attention):
    """From a prompt shorter than the window to far beyond it; the training model goes the same way."""
    _, tiny, directory = exported
    stock = load_stock(directory, attention)
    prompt_1S = random_tokens(batch=1, length=WINDOW - 2)
    options = {"do_sample": False, "min_new_tokens": 3 * WINDOW, "max_new_tokens": 3 * WINDOW}
    options["attention_mask"] = torch.ones_like(prompt_1S)
    cached_1S = stock.generate(prompt_1S, use_cache=True, **options)
    assert torch.equal(cached_1S, stock.generate(prompt_1S, use_cache=False, **options))

    greedy_1S = prompt_1S
    for _ in range(3 * WINDOW):
        next_V = tiny.logits(greedy_1S)[0, -1].clone()
        next_V[0] = -torch.inf  # min_new_tokens keeps the end-of-document token away
        greedy_1S = torch.cat((greedy_1S, next_V.argmax().view(1, 1)), dim=1)
    assert torch.equal(cached_1S, greedy_1S)


def test_a_sharded_export_is_the_same_model(exported, tmp_path):
    _, tiny, directory = exported
    sharded = export_tiny(tiny, tmp_path / "sharded", max_shard_size=40_000)
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (sharded / "model.safetensors").exists()
    whole = load_file(directory / "model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(sharded / shard).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    token_BS = random_tokens()
    with torch.no_grad():
        assert torch.equal(load_stock(directory)(token_BS).logits, load_stock(sharded)(token_BS).logits)


def test_a_window_that_still_grows_is_exported_at_its_final_width(tmp_path):
    """That is what the evaluation during training measures, at every step."""
    growing = HYBRID | {"window_growth": {"start": 1, "iters": 1000}}
    tiny = save_tiny(tmp_path / "checkpoints", attention=growing)
    directory = export_tiny(tiny, tmp_path / "model")
    assert json.loads((directory / "config.json").read_text())["sliding_window"] == WINDOW + 1
    assert largest_difference(tiny, directory) <= TOLERANCE


def test_tied_exports_hold_no_head_and_untied_ones_do(tmp_path):
    for untied in (False, True):
        tiny = save_tiny(tmp_path / f"checkpoints{untied}", untie_embeddings_and_output_weights=untied)
        weights = load_file(export_tiny(tiny, tmp_path / f"model{untied}") / "model.safetensors")
        assert ("lm_head.weight" in weights) is untied
        assert weights["model.embed_tokens.weight"].shape == (301, 48)


def test_sixteen_bits_are_the_fp32_weights_rounded_once(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        directory = export_tiny(tiny, tmp_path / precision, precision=precision)
        held = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(held, tiny.checkpoint.read("layers.1.mlp.up.weight").to(dtype))
        assert json.loads((directory / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
