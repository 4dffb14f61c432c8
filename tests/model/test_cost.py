"""Parameter and FLOP formulas against what a model holds, what it multiplies, and published figures."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ds.config.load import load_config
from megatron_ds.config.model_schema import (
    FullAttention,
    HybridAttention,
    LatentAttention,
    ModelConfig,
    SoftGateAttention,
)
from megatron_ds.config.moe_schema import MoEConfig, SigmoidRouter, SoftmaxRouter
from megatron_ds.model import cost
from megatron_ds.model.decoder import Decoder, layer_list
from megatron_ds.model.init import initialize

CONFIGS = Path(__file__).parents[2] / "ds_configs"

ATTENTIONS = {
    "full": FullAttention(),
    "hybrid": HybridAttention(pattern="LLG", window=50),
    "soft_gate_lse": SoftGateAttention(window=50),
    "soft_gate_bias": SoftGateAttention(window=50, implementation="bias"),
    "latent": LatentAttention(kv_lora_rank=20, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=12),
    "latent_queries": LatentAttention(
        q_lora_rank=24, kv_lora_rank=20, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=28
    ),
}

EXPERTS = {
    "every_layer": MoEConfig(num_experts=6, moe_router_topk=3, dispatcher="local"),
    "shared": MoEConfig(moe_layer_freq=2, moe_shared_expert_intermediate_size=40, router=SigmoidRouter(fine="none")),
    "refine": MoEConfig(moe_layer_freq=(0, 1, 0, 1), moe_ffn_hidden_size=24, router=SoftmaxRouter(fine="refine")),
    "loop": MoEConfig(moe_ffn_hidden_size=20, experts="loop", moe_router_topk=1),
    "one_collective": MoEConfig(moe_ffn_hidden_size=16, dispatcher="all_to_all"),
}


def model(attention="hybrid", **changes):
    settings = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 150,
        "vocab_size": 100, "attention": ATTENTIONS[attention],
    }  # fmt: skip
    if attention.startswith("latent"):
        settings |= {"qk_layernorm": False, "num_query_groups": None}
        refused = ("qk_layernorm", "kv_channels", "add_qkv_bias")
        changes = {name: value for name, value in changes.items() if name not in refused}
    return ModelConfig(**settings | changes)


def deepseek_llm(**sizes):
    return ModelConfig(
        vocab_size=102400, attention=FullAttention(), qk_layernorm=False, untie_embeddings_and_output_weights=True,
        seq_length=4096, **sizes,
    )  # fmt: skip


def preset(name, world_size=32):
    ours = load_config(["--config", str(CONFIGS / f"{name}.json")], world_size=world_size)
    return ours.config.megatron_ds.model, ours.config.megatron_ds.moe


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_layernorm": False, "kv_channels": 24},
        {"untie_embeddings_and_output_weights": True},
        {"add_qkv_bias": True, "kv_channels": 24},
    ],
)
def test_parameters_are_those_of_the_model(attention, changes):
    config = model(attention, **changes)
    with torch.device("meta"):
        held = Decoder(config)
    counts = cost.parameter_counts(config)
    assert cost.num_parameters(config) == sum(p.numel() for p in held.parameters())
    assert counts["embedding"] == held.embedding.weight.numel()
    assert counts["mlp"] == sum(p.numel() for name, p in held.named_parameters() if ".mlp." in name)
    assert counts["attention"] == sum(p.numel() for name, p in held.named_parameters() if ".attention." in name)


def test_the_preset_has_121_million_parameters():
    config, _ = preset("v1")
    with torch.device("meta"):
        held = Decoder(config)
    assert sum(p.numel() for p in held.parameters()) == cost.num_parameters(config) == 121_229_568


def test_the_v2_preset_has_10_billion_parameters_of_which_a_token_meets_1_6():
    config, moe = preset("v2")
    with torch.device("meta"):
        held = Decoder(config, moe)
    total = sum(p.numel() for p in held.parameters())
    per_expert = sum(p.numel() for name, p in held.named_parameters() if ".experts." in name) // 32
    assert total == cost.num_parameters(config, moe) == 10_273_458_176
    assert total - 30 * per_expert == cost.active_parameters(config, moe) == 1_591_248_896
    assert cost.flops_per_token(config, moe) / 1e9 == pytest.approx(9.50, abs=5e-3)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}])
def test_parameters_of_experts_are_those_of_the_model(experts, changes):
    config, moe = model("full", **changes), EXPERTS[experts]
    with torch.device("meta"):
        held = {name: p.numel() for name, p in Decoder(config, moe).named_parameters()}
    counts = cost.parameter_counts(config, moe)
    assert cost.num_parameters(config, moe) == sum(held.values())
    for part in ("router", "experts", "shared"):
        assert counts[part] == sum(size for name, size in held.items() if f".mlp.{part}." in name)
    assert counts["experts"] > 0
    idle = counts["experts"] * (moe.num_experts - moe.moe_router_topk) // moe.num_experts
    assert cost.active_parameters(config, moe) == sum(held.values()) - idle
    assert cost.active_parameters(config) == cost.num_parameters(config)


@pytest.mark.parametrize("experts", EXPERTS)
def test_executed_flops_of_experts_are_what_the_counter_counts(experts):
    config, moe = model("full"), EXPERTS[experts]
    decoder = Decoder(config, moe)
    initialize(decoder.named_parameters(), config, seed=1)
    with FlopCounterMode(display=False) as counter:
        decoder(torch.randint(100, (2, 20))).sum().backward()
    counted = counter.get_total_flops() / (2 * 20)
    assert cost.flops_per_token(config, moe, seq_length=20, convention="executed") == pytest.approx(counted, rel=1e-9)


def test_biases_are_parameters_and_no_products():
    config, plain = model("full", add_qkv_bias=True), model("full")
    assert cost.num_parameters(config) - cost.num_parameters(plain) == 4 * (4 + 2 * 2) * 16
    assert cost.flops_per_token(config) == cost.flops_per_token(plain)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("length", [20, 150])
def test_executed_flops_are_what_the_counter_counts(attention, length):
    config = model(attention, add_qkv_bias=length == 20)
    with FlopCounterMode(display=False) as counter:
        Decoder(config)(torch.zeros(2, length, dtype=torch.long)).sum().backward()
    counted = counter.get_total_flops() / (2 * length)
    assert cost.flops_per_token(config, seq_length=length, convention="executed") == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causal_flops_count_visible_pairs(attention):
    config = model(attention)
    windows = {
        "full": [[None]] * 4,
        "hybrid": [[50], [50], [None], [50]],
        "soft_gate_lse": [[None, 50]] * 4,
        "soft_gate_bias": [[None]] * 4,
        "latent": [[None]] * 4,
        "latent_queries": [[None]] * 4,
    }[attention]
    pairs = sum(min(i, 150 if w is None else w) + 1 for layer in windows for w in layer for i in range(150)) / 150
    matrices = cost.num_parameters(model(attention, qk_layernorm=False)) - (2 * 4 + 1) * 64
    if "soft_gate" in attention:
        matrices -= 4 * 4  # the biases
    if "latent" in attention:
        matrices -= 4 * (20 + (config.attention.q_lora_rank or 0))  # the norms
    widths = {"latent": 16 + 12, "latent_queries": 16 + 28}.get(attention, 16 + 16)
    assert cost.flops_per_token(config) == pytest.approx(6 * matrices + 6 * pairs * 4 * widths, rel=1e-12)


def test_layer_costs_follow_the_layer_list():
    config = model()
    costs = cost.layer_costs(config)
    assert len(costs) == len(layer_list(config))
    assert sum(costs) == cost.flops_per_token(config)
    assert costs[3] > costs[1] == costs[2] == costs[4]  # the global layer
    sparse = cost.layer_costs(config, EXPERTS["shared"])
    assert len(sparse) == len(costs)
    assert [a != b for a, b in zip(costs, sparse, strict=True)] == [False, True, False, True, False, False, False]
    assert sum(sparse) == cost.flops_per_token(config, EXPERTS["shared"])


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("experts", [None, "shared", "refine"])
def test_further_predictions_cost_what_they_hold_and_multiply(depths, experts):
    config, moe = model("latent_queries", mtp_num_layers=depths), EXPERTS.get(experts)
    decoder = Decoder(config, moe)
    initialize(decoder.named_parameters(), config, seed=1)
    held = {name: p.numel() for name, p in decoder.named_parameters()}
    counts = cost.parameter_counts(config, moe)
    assert counts["mtp"] == sum(size for name, size in held.items() if name.startswith("mtp."))
    assert cost.num_parameters(config, moe) == sum(held.values())
    assert cost.num_parameters(cost.without_mtp(config), moe) == sum(held.values()) - counts["mtp"]
    names = [entry.name for entry in layer_list(config, moe)]
    for name, parts in zip(names, cost.layer_parameters(config, moe), strict=True):
        assert parts.total() == sum(size for own, size in held.items() if own.startswith(f"{name}."))

    token_BS = torch.randint(100, (2, 20))
    with FlopCounterMode(display=False) as counter:
        decoder(token_BS, next_token_BS=token_BS).sum().backward()
    counted = counter.get_total_flops() / (2 * 20)
    assert cost.flops_per_token(config, moe, seq_length=20, convention="executed") == pytest.approx(counted, rel=1e-9)
    costs = dict(zip(names, cost.layer_costs(config, moe), strict=True))
    assert sum(costs.values()) == cost.flops_per_token(config, moe)
    assert costs["norm"] == costs["next_tokens"] == 0
    assert costs["mtp"] == depths * (costs["layers.3"] + 6 * 2 * 64 * 64)
    assert costs["output"] == (1 + depths) * 6 * config.padded_vocab_size * 64


def test_the_full_convention_counts_every_pair():
    for attention in ("full", "hybrid", "latent"):
        config = model(attention)
        more = cost.flops_per_token(config) - cost.flops_per_token(config, convention="full")
        width = 3 * 2 * (16 + 12 if attention == "latent" else 16 + 16) * 4
        visible = [51 if attention == "hybrid" and layer != 2 else 150 for layer in range(4)]
        pairs = [sum(min(i + 1, most) for i in range(150)) / 150 - 150 for most in visible]
        assert more == pytest.approx(width * sum(pairs), rel=1e-9)


def test_published_deepseek_v3():
    """Parameters, FLOPs per token and the utilisation that follows from the published step time (arXiv 2505.09343)."""
    config, moe = preset("v3_671b", world_size=2048)
    published = cost.without_mtp(config)
    assert cost.num_parameters(published, moe) // 10**6 == 671_026
    assert cost.active_parameters(published, moe) / 1e9 == pytest.approx(37.55, abs=5e-3)
    embedding = cost.parameter_counts(published, moe)["embedding"]
    assert (cost.active_parameters(published, moe) - embedding) / 1e9 == pytest.approx(36.63, abs=5e-3)
    assert cost.flops_per_token(published, moe) / 1e9 == pytest.approx(250.45, abs=1e-2)
    assert cost.flops_per_token(published, moe, convention="full") / 1e9 == pytest.approx(281.2, abs=5e-2)
    assert cost.flops_per_token(config, moe) / 1e9 == pytest.approx(260.6, abs=5e-2)
    assert cost.parameter_counts(config, moe)["mtp"] / 1e9 == pytest.approx(11.61, abs=5e-3)
    rate = 15360 * 4096 / 19.926 / 2048
    assert 100 * cost.mfu(rate, published, 989.5e12, moe) == pytest.approx(39.0, abs=0.05)
    assert 100 * cost.mfu(rate, published, 989.5e12, moe, convention="full") == pytest.approx(43.8, abs=0.05)


def test_published_deepseek_v2():
    latent = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
    sizes = {"vocab_size": 102400, "qk_layernorm": False, "untie_embeddings_and_output_weights": True}
    lite = ModelConfig(
        num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16, seq_length=4096,
        attention=LatentAttention(**latent), **sizes,
    )  # fmt: skip
    large = ModelConfig(
        num_layers=60, hidden_size=5120, ffn_hidden_size=12288, num_attention_heads=128, seq_length=4096,
        attention=LatentAttention(q_lora_rank=1536, **latent), **sizes,
    )  # fmt: skip
    router = SoftmaxRouter(fine="none")
    few = MoEConfig(
        num_experts=64, moe_router_topk=6, moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=2816,
        moe_layer_freq=(0, *[1] * 26), router=router,
    )  # fmt: skip
    many = MoEConfig(
        num_experts=160, moe_router_topk=6, moe_ffn_hidden_size=1536, moe_shared_expert_intermediate_size=3072,
        moe_layer_freq=(0, *[1] * 59), router=router,
    )  # fmt: skip
    assert cost.num_parameters(lite, few) / 1e9 == pytest.approx(15.706, abs=5e-4)
    assert cost.num_parameters(large, many) / 1e9 == pytest.approx(235.741, abs=5e-4)
    assert cost.flops_per_token(lite, few) / 1e9 == pytest.approx(16.41, abs=5e-3)
    assert cost.flops_per_token(large, many) / 1e9 == pytest.approx(155.3, abs=5e-2)


def test_published_dense_models():
    small = deepseek_llm(num_layers=30, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)
    large = deepseek_llm(
        num_layers=95, hidden_size=8192, ffn_hidden_size=22016, num_attention_heads=64, num_query_groups=8
    )
    assert cost.num_parameters(small) / 1e9 == pytest.approx(6.910, abs=5e-4)
    assert cost.num_parameters(large) / 1e9 == pytest.approx(67.425, abs=5e-4)
    assert cost.flops_per_token(small) / 1e9 == pytest.approx(41.96, abs=6e-3)
    assert cost.flops_per_token(large) / 1e9 == pytest.approx(418.6, abs=6e-2)


def test_published_mixture_of_experts():
    config = deepseek_llm(num_layers=28, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16)
    moe = MoEConfig(
        num_experts=64, moe_router_topk=6, moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=2 * 1408,
        moe_layer_freq=(0, *[1] * 27),
    )  # fmt: skip
    assert cost.num_parameters(config, moe) / 1e9 == pytest.approx(16.4, abs=5e-2)
    assert cost.active_parameters(config, moe) / 1e9 == pytest.approx(2.8, abs=5e-2)
    assert cost.flops_per_token(config, moe) / 1e9 == pytest.approx(17.12, abs=5e-3)


def test_mfu_is_a_share_of_the_peak():
    config = model()
    rate = 1e12 / cost.flops_per_token(config)
    assert cost.mfu(rate, config, peak=4e12) == pytest.approx(0.25)
    moe = EXPERTS["shared"]
    assert cost.mfu(1e12 / cost.flops_per_token(config, moe), config, 4e12, moe) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", None),
    ],
)
def test_device_peaks(name, peak):
    assert cost.device_peak(name) == peak


def test_gemm_roof_is_measured():
    roof = cost.measure_gemm_roof(torch.float32, torch.device("cpu"), seconds=0.05)
    assert 1e9 < roof < 1e13
