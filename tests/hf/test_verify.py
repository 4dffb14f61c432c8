"""--verify: a true export passes in a fresh process, a false one is named and not left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import MODELS, export_tiny, save_tiny

from megatron_ds.errors import CheckpointError
from megatron_ds.hf import export as export_module
from megatron_ds.hf import verify as verify_module
from megatron_ds.hf.verify import verify


def test_a_true_export_passes_and_carries_its_report(tmp_path, tokenizer_directory, capsys):
    """mds_dense in bf16: the longest way, with remote code, rounding and tokenizer."""
    tiny = save_tiny(tmp_path / "checkpoints", tokenizer=tokenizer_directory, **MODELS["mds_dense"])
    directory = export_tiny(tiny, tmp_path / "model", verify=True, precision="bf16")
    lines = capsys.readouterr().out.splitlines()
    assert "in a fresh offline process" in lines[0]
    assert lines[1].startswith("note   loading with trust_remote_code=True")
    assert [line.split(":")[0] for line in lines[2:]] == [
        "ok     weights",
        "ok     logits, eager",
        "ok     logits, sdpa",
        "note   rounding to bf16",
        "ok     greedy generation",
        "ok     tokenizer",
    ]
    report = json.loads((directory / "export_report.json").read_text())
    assert [check["passed"] for check in report["checks"]] == [True, True, True, None, True, True]


@pytest.mark.parametrize(("target", "precision"), [("ernie4_5_moe", "bf16"), ("mds_moe", "fp32")])
def test_experts_are_verified_by_a_loop_and_by_grouped_products(tmp_path, capsys, target, precision):
    """In bf16 the router of the reference stays what it is in the file: fp32."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS[target])
    export_tiny(tiny, tmp_path / "model", verify=True, precision=precision)
    out = capsys.readouterr().out
    assert "ok     logits, eager" in out and "ok     logits, sdpa and grouped_mm" in out
    assert ("carries the mds_moe code" in out) is (target == "mds_moe")


def test_a_tie_between_experts_leaves_out_what_follows_it(tmp_path):
    """With the bias that makes two experts equal at one position, either may be chosen there; before it, none may."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["ernie4_5_moe"])
    token_1S, position = torch.randint(301, (1, 40), generator=torch.Generator().manual_seed(5)), 25
    router, seen = tiny.decoder.layers[-1].mlp.router, []
    handle = router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.probability_TE))
    tiny.logits(token_1S)
    handle.remove()
    choice_E = seen[0][position] + router.bias
    second, third = choice_E.argsort(descending=True)[1:3].tolist()
    _, decided_1P = verify_module._reference_logits(tiny.decoder, token_1S, torch.arange(40))
    assert decided_1P.all()
    router.bias[third] += choice_E[second] - choice_E[third]
    _, decided_1P = verify_module._reference_logits(tiny.decoder, token_1S, torch.arange(40))
    assert decided_1P[0].tolist() == [True] * position + [False] * (40 - position)


def test_a_false_export_is_named_and_not_left_behind(tmp_path, capsys, monkeypatch):
    """One weight off by a percent, as a wrong cast or a mixed-up shard would leave it."""

    def damage_and_verify(directory, *arguments):
        path = directory / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.2.self_attn.v_proj.weight"] *= 1.01
        save_file(weights, path, metadata={"format": "pt"})
        return verify(directory, *arguments)

    monkeypatch.setattr(export_module, "verify", damage_and_verify)
    tiny = save_tiny(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="the export is not the model: logits, eager, logits, sdpa"):
        export_tiny(tiny, tmp_path / "exports" / "model", verify=True)
    out = capsys.readouterr().out
    assert "ok     weights: 0 missing, 0 unexpected" in out and "FAILED logits, eager: max |diff| " in out
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_directory_that_does_not_load_gives_transformers_reason(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints")
    directory = export_tiny(tiny, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"]}))
    with pytest.raises(CheckpointError, match="stock transformers cannot load the export: "):
        verify(directory, tiny.checkpoint, None, "fp32")


def test_rounding_is_what_the_export_rounds(tmp_path):
    """The reference of a 16-bit export has the export's weights, not the checkpoint's."""
    from megatron_ds.hf.decoder import load_decoder

    tiny = save_tiny(tmp_path / "checkpoints")
    rounded = load_decoder(tiny.checkpoint, lambda name: torch.float32 if name == "norm.weight" else torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        rounded_to = torch.float32 if name == "norm.weight" else torch.bfloat16
        assert torch.equal(parameter, tiny.checkpoint.read(name).to(rounded_to).float())
