"""The remote code of the soft gate: against the formula, padding, caches, attention kernels, what loading it takes."""

import filecmp
from importlib.resources import files

import pytest
import torch
from tiny_checkpoint import MODELS, WINDOW, export_tiny, load_stock, random_tokens, save_tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from megatron_ds.hf.remote_code.configuration_mds_dense import MdsDenseConfig
from megatron_ds.hf.remote_code.modeling_mds_dense import MdsDenseAttention


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An mds_dense export."""
    root = tmp_path_factory.mktemp("mds_dense")
    return export_tiny(save_tiny(root / "checkpoints", **MODELS["mds_dense"]), root / "model")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, directory):
    """The export, with each attention implementation."""
    return load_stock(directory, request.param)


def test_attention_is_the_formula():
    """softmax(score + [d > W] * log g) written out, without rotary embedding and norm, one loop per query and head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    config = MdsDenseConfig(**sizes, local_window=WINDOW + 1, use_qk_norm=False)
    config._attn_implementation = "eager"
    attention, length = MdsDenseAttention(config, 0), 11
    x_1SD = torch.randn(1, length, 12)
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)
    causal = torch.zeros(1, 1, length, length).masked_fill(distance_SS < 0, -torch.inf)
    turn = (torch.ones(1, 1, length, 2), torch.zeros(1, 1, length, 2))
    far_SS = (distance_SS >= config.local_window).float()
    with torch.no_grad():
        out_1SD, _ = attention(x_1SD, causal, far_SS, position_embeddings=turn)
        query, key, value = (
            layer(x_1SD[0]).view(length, -1, 4) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        gate_SH = attention.far_gate(x_1SD[0]).sigmoid()
        expected = torch.zeros(length, 4, 4)
        for i in range(length):
            for head in range(4):
                weight = torch.tensor([(query[i, head] @ key[j, head // 2] / 2).exp() for j in range(i + 1)])
                weight *= torch.tensor([gate_SH[i, head] if i - j > WINDOW else 1.0 for j in range(i + 1)])
                expected[i, head] = (weight / weight.sum()) @ value[: i + 1, head // 2]
        torch.testing.assert_close(out_1SD[0], attention.o_proj(expected.view(length, -1)))


def test_left_padding_changes_nothing(model):
    """A padded short prompt beside a long one has the logits, and the continuation, that it has alone."""
    token_2S = random_tokens()
    num_padding = WINDOW + 4
    mask_2S = torch.ones_like(token_2S)
    mask_2S[0, :num_padding] = 0
    alone_1S = token_2S[:1, num_padding:]
    position_2S = (mask_2S.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(token_2S, attention_mask=mask_2S, position_ids=position_2S).logits
        assert torch.isfinite(padded).all()
        torch.testing.assert_close(padded[:1, num_padding:], model(alone_1S).logits, atol=2e-5, rtol=0)
    options = {"do_sample": False, "min_new_tokens": 2 * WINDOW, "max_new_tokens": 2 * WINDOW}
    together = model.generate(token_2S, attention_mask=mask_2S, **options)[0, token_2S.shape[1] :]
    alone = model.generate(alone_1S, attention_mask=torch.ones_like(alone_1S), **options)[0, alone_1S.shape[1] :]
    assert torch.equal(together, alone)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_stays_finite_in_fp16(directory, attention):
    """Hidden far keys overflow fp16 to -inf, but a query is never far from itself: no row is -inf throughout."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float16, attn_implementation=attention, trust_remote_code=True
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.far_gate.bias.fill_(-60.0)
        mask_1S = torch.ones(1, 23, dtype=torch.long)
        mask_1S[0, :9] = 0
        assert torch.isfinite(model(random_tokens(batch=1), attention_mask=mask_1S).logits).all()


def test_a_static_cache_serves_as_well(model):
    token_1S = random_tokens(batch=1)
    with torch.no_grad():
        whole_SV = model(token_1S, use_cache=False).logits[0]
        cache = StaticCache(config=model.config, max_cache_len=40)
        first_SV = model(token_1S[:, :9], past_key_values=cache).logits[0]
        rest_SV = torch.cat([model(token_1S[:, i : i + 1], past_key_values=cache).logits[0] for i in range(9, 23)])
    torch.testing.assert_close(torch.cat((first_SV, rest_SV)), whole_SV, atol=2e-5, rtol=0)


def test_training_features_work(model):
    """Loss, gradient checkpointing, hidden states and the last logits only."""
    token_BS = random_tokens()
    output = model(token_BS, labels=token_BS, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), token_BS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert len(output.hidden_states) == 5
    assert torch.equal(model(token_BS, logits_to_keep=2).logits, output.logits[:, -2:])
    output.loss.backward()
    plain = model.model.layers[0].self_attn.far_gate.weight.grad.clone()
    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable()
    model(token_BS, labels=token_BS, use_cache=False).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.far_gate.weight.grad, plain)
    model.activation_checkpointing_disable()
    model.eval()


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_kernels_that_would_drop_the_gate_are_refused(directory, kernel):
    with pytest.raises((ValueError, ImportError)):
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=kernel, trust_remote_code=True)


def test_engines_with_kernels_of_their_own_are_refused():
    """vLLM's transformers backend asks this flag."""
    from megatron_ds.hf.remote_code.modeling_mds_dense import MdsDenseModel

    assert MdsDenseModel._supports_attention_backend is False


def test_the_code_is_run_only_for_those_who_ask(directory):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    assert AutoConfig.from_pretrained(directory, trust_remote_code=True).local_window == WINDOW + 1
    assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == "MdsDenseModel"


def test_the_directory_carries_our_files_byte_for_byte(directory):
    for name in ("configuration_mds_dense.py", "modeling_mds_dense.py", "modeling_mds_common.py"):
        assert filecmp.cmp(directory / name, str(files("megatron_ds.hf.remote_code").joinpath(name)), shallow=False)


def test_saved_again_it_loads_again(directory, tmp_path):
    """A user's save_pretrained, after fine-tuning say, keeps weights and code."""
    model = load_stock(directory)
    model.save_pretrained(tmp_path)
    again = load_stock(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(random_tokens()).logits, again(random_tokens()).logits)
