"""export_report.json: what stands in it, for every target, and that the figures of parity are what they say."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import MODELS, export_tiny, load_stock, save_tiny

from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.hf import probe
from megatron_ds.hf import verify as verify_module
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.targets import TARGETS
from megatron_ds.hf.verify import verify


@pytest.fixture
def probe_here(monkeypatch):
    """The probe runs in this process, which has transformers already; tests/hf/test_verify.py has it in a fresh one."""

    def run(command, **options):
        probe.main(Path(command[-2]), Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(verify_module.subprocess, "run", run)


def read_report(directory):
    return json.loads((directory / "export_report.json").read_bytes())


def test_the_models_of_the_tests_are_all_targets():
    assert MODELS.keys() == TARGETS.keys()


@pytest.mark.usefixtures("probe_here")
@pytest.mark.parametrize("target", MODELS)
def test_every_target_is_verified_and_reported(tmp_path, capsys, tokenizer_directory, target):
    tiny = save_tiny(tmp_path / "checkpoints", tokenizer=tokenizer_directory, **MODELS[target])
    directory = export_tiny(tiny, tmp_path / "model", target=target, verify=True, command="megatron-ds export-hf ...")
    report, parity = read_report(directory), read_report(directory)["parity"]
    assert (report["target"], report["precision"], report["command"]) == (target, "fp32", "megatron-ds export-hf ...")
    assert report["checkpoint"] == {"step": 7, "manifest_sha256": tiny.checkpoint.manifest.sha256}
    assert report["validation_loss"] == 5.5 and report["not_verified"] is None
    weights = load_file(directory / "model.safetensors").values()
    assert report["weights"] == {
        "tensors": len(weights),
        "parameters": sum(weight.numel() for weight in weights),
        "bytes": sum(weight.nbytes for weight in weights),
    }
    assert 0 < parity["max_logit_difference"] <= parity["limit"] and parity["top1_agreement"] == 1
    assert parity["tokens_compared"] + parity["tokens_left_out"] == 3 * 128
    assert parity["cached_equals_uncached"] and parity["tokenizer_equal"] and parity["rounding"] is None
    printed = capsys.readouterr().out
    for check in report["checks"]:
        assert check["passed"] and f"ok     {check['name']}: {check['detail']}" in printed
    assert len(report["checks"]) == 5


@pytest.mark.usefixtures("probe_here")
def test_the_figures_are_those_of_the_logits(tmp_path):
    """Against logits that are computed here, position by position."""
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["llama"])
    directory = export_tiny(tiny, tmp_path / "model")
    parity = verify(directory, tiny.checkpoint, None, "fp32", report=lambda line: None)
    token_NS = verify_module._sequences(tiny.decoder.config, None)
    ours_NSV = torch.cat([tiny.logits(token_S[None]) for token_S in token_NS])
    differences, agreements = [], []
    for attention in ("eager", "sdpa"):
        stock = load_stock(directory, attention)
        with torch.no_grad():
            theirs_NSV = torch.cat([stock(token_S[None]).logits for token_S in token_NS])
        differences.append((theirs_NSV - ours_NSV).abs().max().item())
        agreements.append((theirs_NSV.argmax(-1) == ours_NSV.argmax(-1)).float().mean().item())
    assert parity.max_logit_difference == pytest.approx(max(differences), rel=0.5)
    assert parity.limit == pytest.approx(2e-5 * max(1, ours_NSV.abs().max().item()))
    assert (parity.top1_agreement, parity.tokens_compared) == (agreements[0], token_NS.numel())
    assert parity.implementations == ("eager", "sdpa") and parity.tokenizer_equal is None


@pytest.mark.usefixtures("probe_here")
def test_sixteen_bits_report_what_rounding_cost(tmp_path):
    tiny = save_tiny(tmp_path / "checkpoints", **MODELS["qwen3_moe"])
    report = read_report(export_tiny(tiny, tmp_path / "model", precision="bf16", verify=True))
    rounding, parity = report["parity"]["rounding"], report["parity"]
    assert report["precision"] == "bf16" and parity["max_logit_difference"] <= parity["limit"]
    assert rounding["max_logit_difference"] > 100 * parity["max_logit_difference"]
    assert 0.5 < rounding["top1_agreement"] <= 1
    assert parity["top1_agreement"] == 1


def test_without_proof_the_reason_stands_there(tmp_path):
    """Also for MTP blocks in a directory of their own, whose weights are counted there."""
    tiny = save_tiny(tmp_path / "checkpoints", mtp_num_layers=1, **MODELS["deepseek_v3"])
    directory = export_tiny(tiny, tmp_path / "model", mtp="separate")
    report, drafts = read_report(directory), read_report(tmp_path / "model-mtp")
    assert (report["parity"], report["checks"], report["not_verified"]) == (None, [], "run export-hf --verify")
    assert (drafts["parity"], drafts["not_verified"]) == (None, "draft blocks have no logits of their own")
    for found, place in ((report, directory), (drafts, tmp_path / "model-mtp")):
        weights = load_file(place / "model.safetensors")
        assert found["weights"]["tensors"] == len(weights)
        assert found["weights"]["parameters"] == sum(weight.numel() for weight in weights.values())


def test_the_configuration_is_there_without_accounts_and_the_same_export_has_the_same_report(tmp_path):
    """In the model card as well."""
    tiny = save_tiny(tmp_path / "checkpoints")
    private = {
        "wandb": {"enabled": True, "team": "hush-team", "project": "hush-project"},
        "comet": {"workspace": "hush-space", "api_key": "hush-key"},
        "tensorboard": {"output_path": "/hush"},
    }
    for name in ("a", "b"):
        checkpoint = open_checkpoint(tiny.checkpoint.path)
        checkpoint.config.update(private)
        export(checkpoint, tmp_path / name / "model", ExportOptions())
    texts = [(tmp_path / "a" / "model" / name).read_text() for name in ("export_report.json", "README.md")]
    assert not any("hush" in text for text in texts)
    assert texts[0] == (tmp_path / "b" / "model" / "export_report.json").read_text()
    report = json.loads(texts[0])
    assert report["config"] == {name: value for name, value in tiny.checkpoint.config.items()
                                if name not in ("wandb", "comet", "tensorboard", "csv_monitor")}  # fmt: skip
    assert {"megatron_ds", "torch", "transformers", "safetensors", "python"} <= report["versions"].keys()
    assert report["versions"]["torch"] == torch.__version__
