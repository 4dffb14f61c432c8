"""The remote code with experts: its router against training's, padding, training features, what loading it takes."""

import filecmp
from importlib.resources import files
from itertools import product

import pytest
import torch
from tiny_checkpoint import FULL, MODELS, WINDOW, export_tiny, load_stock, random_tokens, save_tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.remote_code.configuration_mds_moe import MdsMoeConfig
from megatron_ds.hf.remote_code.modeling_mds_moe import MdsMoeRouter
from megatron_ds.hf.targets import TARGETS
from megatron_ds.hf.targets.common import SpecialIds
from megatron_ds.model.moe.router import Router

ROUTERS = list(
    product(
        ("softmax", "sigmoid"),
        ("none", "bias", "refine"),
        ({}, {"num_groups": 3, "group_topk": 2}),
        ({}, {"norm_topk_prob": False, "scaling_factor": 2.5}),
    )
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An mds_moe export: refine stage, shared expert, every second layer dense, local and global attention."""
    root = tmp_path_factory.mktemp("mds_moe")
    return export_tiny(save_tiny(root / "checkpoints", **MODELS["mds_moe"]), root / "model")


@pytest.mark.parametrize(("kind", "fine", "groups", "weights"), ROUTERS)
def test_the_router_is_the_one_of_training(kind, fine, groups, weights):
    """Same experts in the same order, same weights, for every stage that a router can have."""
    moe = MoEConfig.model_validate(
        {"num_experts": 12, "moe_router_topk": 2, "router": {"kind": kind, "fine": fine} | groups | weights}
    )
    model = ModelConfig(hidden_size=16, num_attention_heads=2, vocab_size=99)
    trained = Router(16, moe).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    settings = TARGETS["mds_moe"].config(model, moe, SpecialIds(0, 0, None), "float32")
    exported = MdsMoeRouter(MdsMoeConfig(**settings))
    names = {"bias": "e_score_correction_bias"}
    state = {names.get(name, name): value for name, value in trained.state_dict().items()}
    exported.load_state_dict({"e_score_correction_bias": torch.zeros(12)} | state)

    x_TD = torch.randn(65, 16, generator=generator)
    with torch.no_grad():
        routing = trained(x_TD)
        weight_TK, expert_TK = exported(x_TD)
    assert torch.equal(expert_TK, routing.expert_TK)
    torch.testing.assert_close(weight_TK, routing.weight_TK, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "model",
    [
        {"qk_layernorm": True, "rotary_interleaved": False, "attention": FULL},
        {"qk_layernorm": False, "rotary_interleaved": True, "untie_embeddings_and_output_weights": True},
    ],
    ids=["half-split, query/key norm, full", "interleaved, local and global, untied"],
)
def test_logits_of_a_sigmoid_router_with_groups(tmp_path, model):
    router = {"kind": "sigmoid", "fine": "bias", "num_groups": 3, "group_topk": 2, "scaling_factor": 1.5}
    moe = MODELS["mds_moe"]["moe"] | {"router": router, "moe_layer_freq": [0, 1, 1, 1]}
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["mds_moe"] | model | {"moe": moe})
    directory, token_BS = export_tiny(tiny, tmp_path / "model"), random_tokens()
    for attention in ("eager", "sdpa"):
        with torch.no_grad():
            logits_BSV = load_stock(directory, attention)(token_BS).logits
        assert (logits_BSV - tiny.logits(token_BS)).abs().max() <= 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_nothing(directory, attention):
    model, token_2S = load_stock(directory, attention), random_tokens()
    num_padding = WINDOW + 4
    mask_2S = torch.ones_like(token_2S)
    mask_2S[0, :num_padding] = 0
    position_2S = (mask_2S.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(token_2S, attention_mask=mask_2S, position_ids=position_2S).logits
        alone = model(token_2S[:1, num_padding:]).logits
    torch.testing.assert_close(padded[:1, num_padding:], alone, atol=2e-5, rtol=0)


def test_training_features_work(directory):
    """Loss, gradients of every parameter, gradient checkpointing, hidden states."""
    model, token_BS = load_stock(directory), random_tokens()
    output = model(token_BS, labels=token_BS, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    plain = model.model.layers[0].mlp.gate.refine.grad.clone()
    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable()
    model(token_BS, labels=token_BS, use_cache=False).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.gate.refine.grad, plain)


def test_autocast_leaves_the_router_in_fp32(directory):
    router, x_TD = load_stock(directory).model.layers[0].mlp.gate, torch.randn(65, 48)
    with torch.no_grad():
        expected = router(x_TD)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, router(x_TD), expected))


def test_a_new_model_has_initial_weights():
    from megatron_ds.hf.remote_code.modeling_mds_moe import MdsMoeForCausalLM

    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = MdsMoeForCausalLM(
        MdsMoeConfig(**sizes, moe_intermediate_size=64, refine_candidates=4, rope_parameters=rope)
    )
    block = model.model.layers[0].mlp
    for weight in (block.gate.weight, block.gate.refine, block.experts.gate_up_proj, block.experts.down_proj):
        assert 0.015 < weight.std() < 0.025
    assert not block.gate.e_score_correction_bias.any()


def test_the_code_is_run_only_for_those_who_ask(directory):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    assert AutoConfig.from_pretrained(directory, trust_remote_code=True).refine_candidates == 3
    assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == "MdsMoeModel"


def test_the_directory_carries_our_files_byte_for_byte(directory):
    for name in ("configuration_mds_moe.py", "modeling_mds_moe.py", "modeling_mds_common.py"):
        assert filecmp.cmp(directory / name, str(files("megatron_ds.hf.remote_code").joinpath(name)), shallow=False)
