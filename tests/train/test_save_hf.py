"""Exports beside the checkpoints: which are made and kept, what a failure costs, and the process that makes them."""

import json
import subprocess
import sys
import threading

import pytest
from tiny_checkpoint import EXPERTS, MODELS, SOFT_GATE, run_config, save_tiny

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.train import save_hf
from megatron_ds.train.save_hf import HuggingFaceSaver, check_expressible, export_apart

MTP = MODELS["deepseek_v3"] | {"num_layers": 2, "mtp_num_layers": 1}
MTP |= {"moe": MTP["moe"] | {"moe_layer_freq": [0, 1]}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint whose weights all others have."""
    return save_tiny(tmp_path_factory.mktemp("tiny")).checkpoint


@pytest.fixture
def save(tmp_path, tiny):
    """``save(step, *losses)`` commits a checkpoint that was evaluated so; its path."""

    def commit(step, *losses, source=tiny):
        shapes = source.shapes()
        fragments = [Fragment(name, "weight", shapes[name], whole(shapes[name]), 0, source.read(name).flatten())
                     for name in shapes]  # fmt: skip
        trainer = {"step": step, "eval": {f"set{number}": loss for number, loss in enumerate(losses)}}
        store = CheckpointStore(tmp_path, SingleProcess())
        return store.save(step, fragments, rank_state={}, trainer=trainer, config=source.config).path

    return commit


@pytest.fixture
def quick(monkeypatch):
    """Exports are made in this process, without the proof."""

    def export_here(checkpoint, output):
        export(open_checkpoint(checkpoint), output, ExportOptions(force=True))

    monkeypatch.setattr(save_hf, "export_apart", export_here)


def names(directory):
    """Everything in hf/, hidden files included."""
    return sorted(path.name for path in (directory / "hf").iterdir())


# --- which are made and kept ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_every_keeps_all_and_last_only_the_newest(tmp_path, save):
    every, last = HuggingFaceSaver(tmp_path, "every"), HuggingFaceSaver(tmp_path, "last")
    lines = [line for step in (1, 2) for line in every.after_save(save(step))]
    made = "exported step {step} as qwen3 to {directory}/hf/global_step{step} (not verified: run export-hf --verify)"
    assert lines == [made.format(step=step, directory=tmp_path) for step in (1, 2)]
    assert names(tmp_path) == ["global_step1", "global_step2"]
    (tmp_path / "hf" / "notes").mkdir()
    last.after_save(save(3))
    assert names(tmp_path) == ["global_step3", "notes"], "and what is not an export stays"


@pytest.mark.usefixtures("quick")
def test_the_new_one_is_whole_before_the_old_one_goes(tmp_path, save, monkeypatch):
    saver = HuggingFaceSaver(tmp_path, "last")
    saver.after_save(save(1))
    seen = []

    def watch(path):
        seen.append((path.name, (tmp_path / "hf" / "global_step2" / "export_report.json").exists()))

    monkeypatch.setattr(save_hf, "discard", watch)
    saver.after_save(save(2))
    assert seen == [("global_step1", True)]


@pytest.mark.usefixtures("quick")
def test_best_is_the_lowest_mean_so_far_also_after_a_restart(tmp_path, save):
    kept = []
    for step, losses in enumerate([(3.0, 5.0), (4.0, 4.0), (6.0, 1.0), (3.6,), (float("nan"),), (3.4,)], start=1):
        saver = HuggingFaceSaver(tmp_path, "best")  # as after a restart: it knows what is there
        saver.after_save(save(step, *losses))
        kept.append(names(tmp_path))
    steps = [1, 1, 3, 3, 3, 6]
    assert kept == [[f"global_step{step}"] for step in steps]
    (line,) = HuggingFaceSaver(tmp_path, "best").after_save(save(7))
    assert line == "global_step7 is not exported: it has no validation loss that could be the best"


@pytest.mark.usefixtures("quick")
def test_a_directory_of_mtp_blocks_comes_and_goes_with_its_model(tmp_path, save):
    source = save_tiny(tmp_path / "source", **MTP).checkpoint
    saver = HuggingFaceSaver(tmp_path, "last")
    for step in (1, 2):
        saver.after_save(save(step, source=source))
        assert names(tmp_path) == [f"global_step{step}", f"global_step{step}-mtp"]


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_failure_leaves_what_was_there_and_the_next_save_cleans_up(tmp_path, save, monkeypatch):
    saver = HuggingFaceSaver(tmp_path, "last")
    saver.after_save(save(1))

    def die(checkpoint, output):
        (output.parent / f".{output.name}.x7" / "export").mkdir(parents=True)
        raise CheckpointError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save_hf, "export_apart", die)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.after_save(save(2))
    assert names(tmp_path) == [".global_step2.x7", "global_step1"]
    saver.after_save(save(3))
    assert names(tmp_path) == ["global_step3"]


@pytest.mark.usefixtures("quick")
def test_an_export_that_cannot_be_removed_is_one_line(tmp_path, save, monkeypatch):
    saver = HuggingFaceSaver(tmp_path, "last")
    saver.after_save(save(1))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(save_hf, "discard", refuse)
    with pytest.raises(CheckpointError, match=r"global_step2 to .*/hf failed: .*Permission denied$"):
        saver.after_save(save(2))


def test_what_no_target_expresses_is_found_before_the_run():
    def config(when, **model):
        tree = run_config(**model)
        tree["megatron_ds"]["checkpoint"]["save_hf"] = when
        return RunConfig.model_validate(tree)

    check_expressible(config("every"))
    check_expressible(config(None, attention=SOFT_GATE, moe=EXPERTS))
    refusal = r"^checkpoint\.save_hf = best: no target can express .*soft_gate.*; leave it out$"
    with pytest.raises(ConfigError, match=refusal):
        check_expressible(config("best", attention=SOFT_GATE, moe=EXPERTS))


# --- the process ----------------------------------------------------------------------------------------------------


def test_a_thread_of_a_rank_has_it_exported_and_verified(tmp_path, save, monkeypatch):
    """With a launcher's variables around it, in a directory that has a file with the name of a module."""
    launcher = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise RuntimeError('not this one')")
    path, lines = save(5, 4.0, 2.0), []
    thread = threading.Thread(target=lambda: lines.extend(HuggingFaceSaver(tmp_path, "best").after_save(path)))
    thread.start()
    thread.join()
    report = json.loads((tmp_path / "hf" / "global_step5" / "export_report.json").read_bytes())
    assert report["validation_loss"] == 3.0 and report["parity"]["cached_equals_uncached"]
    assert 0 < report["parity"]["max_logit_difference"] <= report["parity"]["limit"]
    assert report["command"] == f"megatron-ds export-hf --load {path} --output {tmp_path}/hf/global_step5 --verify"
    figures = report["parity"]
    proof = f"max |diff| of logits {figures['max_logit_difference']:.1e}, limit {figures['limit']:.1e}"
    assert lines == [f"exported step 5 as qwen3 to {tmp_path}/hf/global_step5 ({proof})"]


def test_its_reason_is_the_error(tmp_path, save):
    path = save(1)
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(ConfigError, match=r"exporting .*global_step1 failed: --output .*File exists"):
        HuggingFaceSaver(tmp_path, "last").after_save(path)


def test_it_ends_with_the_run(tmp_path, save):
    command = [sys.executable, "-m", "megatron_ds.train.save_hf", str(save(1)), str(tmp_path / "hf" / "global_step1")]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, b"") and not (tmp_path / "hf" / "global_step1").exists()


def test_it_is_no_rank_and_its_death_is_told(tmp_path, save, monkeypatch):
    environment = {}

    def die(command, **options):
        environment.update(options["env"])
        return subprocess.CompletedProcess(command, -9, stderr="")

    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "CROSS_RANK",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "PMI_RANK",
    )
    for name in (*launcher, "MY_RANKING"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(save_hf.subprocess, "run", die)
    with pytest.raises(CheckpointError, match=r"failed: it was killed by SIGKILL$"):
        export_apart(save(1), tmp_path / "out")
    assert [name for name in environment if "RANK" in name or "WORLD" in name or "MASTER" in name] == ["MY_RANKING"]
    assert "TORCHELASTIC_RUN_ID" not in environment
