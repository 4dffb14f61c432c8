"""Parameter and FLOP formulas against what a model holds, what it multiplies, and published figures."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ds.config.schema import FullAttention, HybridAttention, ModelConfig, SoftGateAttention
from megatron_ds.model import cost
from megatron_ds.model.decoder import Decoder, layer_list

ATTENTIONS = {
    "full": FullAttention(),
    "hybrid": HybridAttention(pattern="LLG", window=50),
    "soft_gate_lse": SoftGateAttention(window=50),
    "soft_gate_bias": SoftGateAttention(window=50, implementation="bias"),
}


def model(attention="hybrid", **changes):
    settings = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 150,
        "vocab_size": 100, "attention": ATTENTIONS[attention],
    }  # fmt: skip
    return ModelConfig(**settings | changes)


def deepseek_llm(**sizes):
    return ModelConfig(
        vocab_size=102400, attention=FullAttention(), qk_layernorm=False, untie_embeddings_and_output_weights=True,
        seq_length=4096, **sizes,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "changes", [{}, {"qk_layernorm": False, "kv_channels": 24}, {"untie_embeddings_and_output_weights": True}]
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
    tree = json.loads((Path(__file__).parents[2] / "ds_configs/v1.json").read_text())
    config = ModelConfig(**{"vocab_size": 50257} | tree["megatron_ds"]["model"])
    with torch.device("meta"):
        held = Decoder(config)
    assert sum(p.numel() for p in held.parameters()) == cost.num_parameters(config) == 121_229_568


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("length", [20, 150])
def test_executed_flops_are_what_the_counter_counts(attention, length):
    config = model(attention)
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
    }[attention]
    pairs = sum(min(i, 150 if w is None else w) + 1 for layer in windows for w in layer for i in range(150)) / 150
    matrices = cost.num_parameters(model(attention, qk_layernorm=False)) - (2 * 4 + 1) * 64
    if "soft_gate" in attention:
        matrices -= 4 * 4  # the biases
    assert cost.flops_per_token(config) == pytest.approx(6 * matrices + 6 * pairs * 4 * (16 + 16), rel=1e-12)


def test_layer_costs_follow_the_layer_list():
    config = model()
    costs = cost.layer_costs(config)
    assert len(costs) == len(layer_list(config))
    assert sum(costs) == cost.flops_per_token(config)
    assert costs[3] > costs[1] == costs[2] == costs[4]  # the global layer


def test_published_dense_models():
    small = deepseek_llm(num_layers=30, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)
    large = deepseek_llm(
        num_layers=95, hidden_size=8192, ffn_hidden_size=22016, num_attention_heads=64, num_query_groups=8
    )
    assert cost.num_parameters(small) / 1e9 == pytest.approx(6.910, abs=5e-4)
    assert cost.num_parameters(large) / 1e9 == pytest.approx(67.425, abs=5e-4)
    assert cost.flops_per_token(small) / 1e9 == pytest.approx(41.96, abs=6e-3)
    assert cost.flops_per_token(large) / 1e9 == pytest.approx(418.6, abs=6e-2)


def test_mfu_is_a_share_of_the_peak():
    config = model()
    rate = 1e12 / cost.flops_per_token(config)
    assert cost.mfu(rate, config, peak=4e12) == pytest.approx(0.25)


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
