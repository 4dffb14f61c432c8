"""Experts in an export: names on disk, precisions, patterns of layers, routers; and what transformers saves again."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import EXPERTS, FULL, MODELS, export_tiny, load_stock, random_tokens, save_tiny
from transformers import AutoModelForCausalLM

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.targets import TARGETS

TOLERANCE = 2e-5
PLAIN = {"router": {"kind": "softmax", "fine": "none"}}
ROUTER_NAMES = {
    "ernie4_5_moe": {"mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"},
    "qwen3_moe": {"mlp.gate.weight"},
    "mixtral": {"block_sparse_moe.gate.weight"},
    "deepseek_v3": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    "deepseek_v2": {"mlp.gate.weight"},
    "mds_moe": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.gate.refine"},
}
FP32_IN_MEMORY = {"ernie4_5_moe": ".gate.", "deepseek_v3": ".e_score_correction_bias", "mds_moe": ".gate."}
"""What of a router transformers itself keeps in fp32 when it loads 16 bits."""
USUAL_NAMES = tuple(f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down"))
EXPERT_NAMES = dict.fromkeys(ROUTER_NAMES, USUAL_NAMES) | {
    "mixtral": tuple(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2"))
}


@pytest.fixture(scope="module", params=ROUTER_NAMES)
def exported(request, tmp_path_factory):
    """(target, tiny model, export directory) of each target with experts."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny = save_tiny(directory / "checkpoints", **MODELS[request.param])
    return request.param, tiny, export_tiny(tiny, directory / "model")


def weights_of(directory):
    """Every tensor of an export, from however many files."""
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_logits(tiny, directory):
    token_BS = random_tokens()
    for attention, implementation in (("eager", "eager"), ("sdpa", "grouped_mm")):
        model = load_stock(directory, attention)
        assert model.config._experts_implementation == implementation
        with torch.no_grad():
            logits_BSV = model(token_BS).logits
        assert (logits_BSV - tiny.logits(token_BS)).abs().max() <= TOLERANCE


def test_every_expert_has_tensors_of_its_own(exported):
    target, tiny, directory = exported
    weights = weights_of(directory)
    for layer, block in enumerate(tiny.decoder.layers):
        prefix = f"model.layers.{layer}."
        names = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
        sparse = {name for name in names if "expert" in name and "shared" not in name} | (names & ROUTER_NAMES[target])
        if not tiny.decoder.moe.is_moe_layer(layer):
            assert not sparse and "mlp.gate_proj.weight" in names
            continue
        assert sparse == ROUTER_NAMES[target] | {name.format(e) for name in EXPERT_NAMES[target] for e in range(6)}
        assert not any(re.search("balance|load", name) for name in names), "what training counts is no weight"
        for expert in range(6):
            gate, up, down = (weights[prefix + name.format(expert)] for name in EXPERT_NAMES[target])
            assert torch.equal(torch.stack((gate, up)), block.mlp.experts.gate_up[expert])
            assert torch.equal(down, block.mlp.experts.down[expert])


def test_one_part_of_one_expert_is_read_at_a_time(exported, tmp_path, monkeypatch):
    """The values of a stack are never asked for as a whole."""
    _, tiny, _ = exported
    read_range, largest = tiny.checkpoint.read_range, {}

    def watch(name, kind, box, start, length):
        largest[name] = max(length, largest.get(name, 0))
        return read_range(name, kind, box, start, length)

    monkeypatch.setattr(tiny.checkpoint, "read_range", watch)
    export_tiny(tiny, tmp_path / "model")
    assert {size for name, size in largest.items() if "experts" in name} == {40 * 48}


def test_the_checkpoint_may_be_in_the_pieces_of_many_ranks(tmp_path):
    """Two expert-parallel ranks, each stack further cut in the middle of an expert, as ZeRO does."""
    tiny = save_tiny(tmp_path / "whole", **MODELS["ernie4_5_moe"])
    fragments = []
    for name, tensor in tiny.decoder.state_dict().items():
        for lo, hi in ((0, 2), (2, 6)) if ".experts." in name else [(0, len(tensor))]:
            box = ((lo, hi), *whole(tensor.shape)[1:])
            values, cut = tensor[lo:hi].flatten(), tensor[lo:hi].numel() * 3 // 7
            fragments.append(Fragment(name, "weight", tuple(tensor.shape), box, 0, values[:cut]))
            fragments.append(Fragment(name, "weight", tuple(tensor.shape), box, cut, values[cut:]))
    CheckpointStore(tmp_path / "pieces", SingleProcess()).save(
        7, fragments, rank_state={}, trainer={}, config=tiny.checkpoint.config
    )
    export(open_checkpoint(tmp_path / "pieces"), tmp_path / "from_pieces", ExportOptions())
    expected, weights = weights_of(export_tiny(tiny, tmp_path / "model")), weights_of(tmp_path / "from_pieces")
    assert expected.keys() == weights.keys() and all(torch.equal(expected[name], weights[name]) for name in expected)


def test_experts_may_lie_in_several_files(exported, tmp_path):
    _, tiny, directory = exported
    sharded = export_tiny(tiny, tmp_path / "model", max_shard_size=20_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in index.items() if name.startswith("model.layers.2.") and "experts" in name}) > 1
    single, parts = weights_of(directory), weights_of(sharded)
    assert single.keys() == parts.keys() and all(torch.equal(single[name], parts[name]) for name in single)
    assert_same_logits(tiny, sharded)


def test_saved_again_it_is_the_same_directory(exported, tmp_path):
    """A user's save_pretrained: the same names and values, which load again."""
    _, _, directory = exported
    model = load_stock(directory)
    model.save_pretrained(tmp_path)
    first, second = weights_of(directory), weights_of(tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(model(random_tokens()).logits, load_stock(tmp_path)(random_tokens()).logits)


def test_sixteen_bits_leave_the_router_what_its_family_computes_in(exported, tmp_path):
    """In the file; in memory transformers decides, and computes DeepSeek's in fp32 from rounded weights."""
    target, tiny, _ = exported
    directory = export_tiny(tiny, tmp_path / "model", precision="bf16")
    kept = TARGETS[target].kept_fp32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=True)
    loaded = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name, weight in weights_of(directory).items():
        is_router = any(name.endswith(router) for router in ROUTER_NAMES[target])
        assert weight.dtype == (torch.float32 if is_router and kept else torch.bfloat16)
    in_memory = FP32_IN_MEMORY.get(target)
    for name, dtype in loaded.items():
        assert dtype == (torch.float32 if in_memory and in_memory in name else torch.bfloat16), name
    with torch.no_grad():
        assert torch.isfinite(model(random_tokens()).logits).all()


@pytest.mark.parametrize("ran_in", ["fp32", "bf16"])
def test_the_router_holds_what_training_computed_with(tmp_path, ran_in):
    """A bf16 run rounded the weight in every step, so its export does; the bias was fp32 in any run."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["ernie4_5_moe"])
    tiny.checkpoint.config["bf16"]["enabled"] = ran_in == "bf16"
    weights = weights_of(export_tiny(tiny, tmp_path / "model", precision="bf16"))
    router = tiny.decoder.layers[1].mlp.router
    expected = router.weight.bfloat16().float() if ran_in == "bf16" else router.weight
    assert torch.equal(weights["model.layers.1.mlp.gate.weight"], expected)
    assert torch.equal(weights["model.layers.1.mlp.moe_statics.e_score_correction_bias"][0], router.bias)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("ernie4_5_moe", {"moe_layer_freq": [0, 1, 0, 1]}),
        ("ernie4_5_moe", {"moe_layer_freq": [0, 0, 1, 0], "moe_shared_expert_intermediate_size": None}),
        ("ernie4_5_moe", PLAIN | {"moe_router_topk": 3, "moe_layer_freq": 1}),
        ("ernie4_5_moe", {"moe_ffn_hidden_size": None, "moe_router_topk": 1}),
        ("qwen3_moe", {"moe_layer_freq": [0, 1, 1, 1]}),
        ("qwen3_moe", {"moe_layer_freq": 3, "router": PLAIN["router"] | {"norm_topk_prob": False}}),
        ("mixtral", {"num_experts": 5, "moe_router_topk": 5}),
    ],
    ids=["every second layer", "one layer, no shared expert", "no bias", "top-1", "dense first", "not normalised",
         "all experts chosen"],
)  # fmt: skip
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_layers_and_routers(tmp_path, target, changes, untied):
    model = MODELS[target] | {"untie_embeddings_and_output_weights": untied}
    tiny = save_tiny(tmp_path / "checkpoints", **model | {"moe": model["moe"] | changes})
    directory = export_tiny(tiny, tmp_path / "model")
    assert json.loads((directory / "config.json").read_text())["model_type"] == target
    assert ("lm_head.weight" in weights_of(directory)) is untied
    assert_same_logits(tiny, directory)


def test_a_router_without_bias_gets_zeros_where_the_family_has_one(tmp_path):
    model = MODELS["ernie4_5_moe"] | {"moe": EXPERTS | PLAIN}
    directory = export_tiny(save_tiny(tmp_path / "checkpoints", **model), tmp_path / "model", precision="bf16")
    bias_1E = weights_of(directory)["model.layers.0.mlp.moe_statics.e_score_correction_bias"]
    assert torch.equal(bias_1E, torch.zeros(1, 6))


def test_the_bias_decides(tmp_path):
    """The bias of these tests moves tokens to other experts: an export that lost it would not pass."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["ernie4_5_moe"])
    token_BS = random_tokens()
    before = tiny.logits(token_BS)
    for layer in tiny.decoder.layers[1:]:
        layer.mlp.router.bias.zero_()
    assert (tiny.logits(token_BS) - before).abs().max() > 1000 * TOLERANCE


def test_the_card_counts_total_and_active_parameters(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["ernie4_5_moe"])
    card = (export_tiny(tiny, tmp_path / "model") / "README.md").read_text()
    total = sum(p.numel() for p in tiny.decoder.parameters()) - (384 - 301) * 48
    active = total - 3 * (6 - 2) * 3 * 48 * 40
    for fact in (
        "A sparse mixture of experts",
        f"| Parameters | {total:,} (fp32) |",
        f"| Active parameters of a token | {active:,} |",
        "| Layers with experts | 3 of 4 |",
        "| Experts x width | 6 x 40, 2 for each token |",
        "| Width of the shared expert | 80 |",
        "| Router | softmax, fine stage bias |",
        "| Feed-forward width | 80 |",
    ):
        assert fact in card, fact
    every = save_tiny(tmp_path / "every", attention=FULL, qk_layernorm=False, moe=EXPERTS | PLAIN)
    assert "Feed-forward width" not in (export_tiny(every, tmp_path / "mixtral") / "README.md").read_text()
