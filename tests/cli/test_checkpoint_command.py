"""``megatron-ds checkpoint``: what is listed, verified, compared and averaged, and how each ends."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from megatron_ds.checkpoint.manifest import MANIFEST, list_names
from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
from megatron_ds.cli.main import main
from megatron_ds.config.schema import RunConfig
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.decoder import check_tensors, read_config
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.model.decoder import Decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from checkpoint_tools import cut, on_ranks

MODEL = {
    "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 12, "seq_length": 16, "vocab_size": 51,
}  # fmt: skip


def state(step):
    """Weights and one optimizer state of a model, different at every step."""
    config = RunConfig.model_validate({"megatron_ds": {"model": MODEL, "data": {"eod_id": 0}}}).megatron_ds
    weights = Decoder(config.model, config.moe).state_dict()
    generator = torch.Generator().manual_seed(step)
    return {
        (name, kind): torch.randn(weight.shape, generator=generator)
        for kind in ("weight", "exp_avg")
        for name, weight in weights.items()
    }


def save(directory, step, tensors=None, tensor_ranks=1, data_ranks=1, mean=False, **trainer):
    """Save as ranks of that layout would: rows over tensor ranks, ranges of them over data ranks."""
    tensors = tensors or state(step)
    if mean:
        tensors |= {(name, "ema"): tensor for (name, kind), tensor in tensors.items() if kind == "weight"}
    parallel = {"tensor_model_parallel_size": tensor_ranks}
    config = RunConfig.model_validate(
        {
            "megatron_ds": {"model": MODEL, "data": {"eod_id": 0}, "parallel": parallel},
            "zero_optimization": {"stage": 1},
        }
    )

    def part(tensor, rank):
        data, row = divmod(rank, tensor_ranks)
        rows = tensor.shape[0]
        lo, hi = rows * row // tensor_ranks, rows * (row + 1) // tensor_ranks
        box = ((lo, hi), *whole(tensor.shape)[1:])
        values = cut(tensor, box)
        start, end = (values.numel() * part // data_ranks for part in (data, data + 1))
        return box, start, values[start:end].clone()

    def work(peers):
        return CheckpointStore(directory, peers).save(
            step,
            [Fragment(*key, tuple(tensor.shape), *part(tensor, peers.rank)) for key, tensor in tensors.items()],
            rank_state={"torch": torch.arange(3)},
            trainer={"step": step, "consumed_samples": 8 * step, "consumed_tokens": 1000 * step, "engine": {}}
            | trainer,
            config=config.model_dump(mode="json"),
        )

    for result in on_ranks(tensor_ranks * data_ranks, work):
        if isinstance(result, Exception):
            raise result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with three steps of different layouts."""
    run = tmp_path_factory.mktemp("run")
    save(run / "checkpoints", 100, train_loss=2.5, eval={"web": 2.0, "code": 1.0})
    save(
        run / "checkpoints",
        200,
        tensor_ranks=2,
        data_ranks=2,
        mean=True,
        train_loss=2.25,
        eval={"web": 1.0, "code": 1.5},
    )
    save(run / "checkpoints", 300, data_ranks=3, train_loss=2.125, eval={"web": 1.75, "code": 1.5})
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def checkpoint(capsys, *argv, code=0):
    """The lines that an action prints."""
    assert main(["checkpoint", *map(str, argv)]) == code
    return capsys.readouterr().out.splitlines()


def rows(lines):
    """The lines of ls's table below its head, with single blanks."""
    return [" ".join(line.split()) for line in lines[3:] if line.strip()]


# --- ls -------------------------------------------------------------------------------------------------------------


def test_ls_has_a_line_per_checkpoint(capsys, run):
    for age, step in ((50, 300), (3 * 3600 + 5, 200), (10 * 86400, 100)):
        when = time.time() - age
        os.utime(run / "checkpoints" / f"global_step{step}" / MANIFEST, (when, when))
    lines = checkpoint(capsys, "ls", run)
    assert " ".join(lines[1].split()) == "step age size ranks tokens train loss eval loss layout ema"
    sizes = []
    for step in (100, 200, 300):
        path = run / "checkpoints" / f"global_step{step}"
        sizes.append(tqdm.format_sizeof(sum((path / name).stat().st_size for name in list_names(path))) + "B")
    assert rows(lines) == [
        f"100 10 d {sizes[0]} 1 100,000 2.5000 1.5000 tp 1 pp 1 dp 1 ep 1 ZeRO-1 no",
        f"200 3 h {sizes[1]} 4 200,000 2.2500 1.2500 tp 2 pp 1 dp 2 ep 1 ZeRO-1 yes best",
        f"300 50 s {sizes[2]} 3 300,000 2.1250 1.6250 tp 1 pp 1 dp 3 ep 1 ZeRO-1 no latest",
    ]
    assert checkpoint(capsys, "ls", run / "checkpoints") == lines


def test_ls_marks_what_is_not_whole_and_changes_nothing(capsys, run):
    directory = run / "checkpoints"
    os.truncate(directory / "global_step300" / "rank_00002.safetensors", 3)
    (directory / "global_step200").rename(directory / "global_step200.old")
    shutil.copytree(directory / "global_step100", directory / "global_step400.tmp")
    (directory / "global_step500").mkdir()
    before = list_names(run)
    shown = rows(checkpoint(capsys, "ls", run))
    assert list_names(run) == before
    assert shown[0].endswith("ZeRO-1 no")
    aside = "set aside by an interrupted save; the next save puts it back, or removes it"
    assert shown[1].startswith("200 ") and shown[1].endswith(f"ZeRO-1 yes best, {aside}")
    assert "- - - - - - latest, damaged: rank_00002.safetensors: has 3 bytes instead of " in shown[2]
    assert shown[3].endswith("- - - - - - left by an interrupted save or removal; the next save removes it")
    assert "damaged: manifest.json: missing" in shown[4] and shown[4].startswith("500 ")


def test_ls_reads_no_values(capsys, run, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("megatron_ds.checkpoint.reader.Checkpoint.read_range", refuse)
    monkeypatch.setattr("megatron_ds.checkpoint.manifest._digest", refuse)
    assert len(rows(checkpoint(capsys, "ls", run))) == 3


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_hashes_the_newest_one_or_all(capsys, run):
    assert [line.split(": ")[0].rpartition("/")[2] for line in checkpoint(capsys, "verify", run)] == ["global_step300"]
    lines = checkpoint(capsys, "verify", run, "--step", "all")
    assert len(lines) == 3 and all(": whole, " in line for line in lines)
    (line,) = checkpoint(capsys, "verify", run, "--step", "200")
    assert "/global_step200: whole, 10 files, " in line
    (line,) = checkpoint(capsys, "verify", run / "checkpoints" / "global_step100")
    assert "/global_step100: whole, 4 files, " in line


def test_verify_names_every_bad_file_and_ends_with_code_4(capsys, run):
    step = run / "checkpoints" / "global_step200"
    names = [name for name in list_names(step) if name != MANIFEST]
    for name in names:
        content = bytearray((step / name).read_bytes())
        content[-1] ^= 1
        (step / name).write_bytes(content)
    (step / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"^1 of 3 checked are damaged: global_step200; the lines above"):
        main(["checkpoint", "verify", str(run), "--step", "all"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "/global_step200: " in line] == [
        *(f"{step}: {name}: sha256 differs" for name in names),
        f"{step}: empty/: not in the manifest",
    ]
    assert CheckpointError.exit_code == 4
    (step / MANIFEST).unlink()
    with pytest.raises(CheckpointError):
        main(["checkpoint", "verify", str(step)])
    assert "manifest.json: missing" in capsys.readouterr().out


# --- diff -----------------------------------------------------------------------------------------------------------


def test_the_same_state_in_other_layouts_has_the_same_values(capsys, tmp_path):
    tensors = state(1)
    save(tmp_path / "a", 5, dict(tensors), train_loss=float("nan"))
    save(tmp_path / "b", 5, dict(tensors), tensor_ranks=2, data_ranks=2, train_loss=float("nan"))
    lines = checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "b", "--values", code=1)
    assert lines[2:] == ["configuration:", "  megatron_ds.parallel.tensor_model_parallel_size: 1 -> 2"]
    assert checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "a", "--values")[-1] == "no difference"
    assert "but perhaps in values" in checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "a")[-1]


def test_every_kind_of_difference_is_a_line(capsys, tmp_path):
    tensors = state(1)
    names = [name for name, kind in tensors if kind == "weight"]
    save(tmp_path / "a", 5, dict(tensors) | {("only.a", "weight"): torch.ones(2)}, data_ranks=2, train_loss=1.5)
    others = {
        (name, "momentum_buffer" if kind == "exp_avg" else kind): t.clone() for (name, kind), t in tensors.items()
    }
    others[names[0], "weight"] = others[names[0], "weight"].bfloat16()
    others[names[1], "weight"] = torch.ones(3, 3)
    others[names[2], "weight"].view(-1)[[0, 3]] += torch.tensor([0.5, -2.0])
    others[names[3], "weight"].view(-1)[1] = float("nan")
    others[names[4], "weight"].view(-1)[0] = float("inf")
    save(tmp_path / "b", 6, others, train_loss=1.5)
    lines = checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "b", "--values", code=1)
    shapes = {name: list(tensor.shape) for (name, kind), tensor in tensors.items()}
    sections = "\n".join(lines).split("values:\n")
    assert sections[0].splitlines()[2:] == [
        "trainer:",
        "  consumed_samples: 40 -> 48",
        "  consumed_tokens: 5000 -> 6000",
        "  step: 5 -> 6",
        "tensors:",
        "  exp_avg: only in a",
        "  momentum_buffer: only in b",
        *sorted(
            [
                f"  weight of {names[0]}: {shapes[names[0]]} float32 -> {shapes[names[0]]} bfloat16",
                f"  weight of {names[1]}: {shapes[names[1]]} float32 -> [3, 3] float32",
                "  weight of only.a: only in a",
            ]
        ),
    ]
    values = sections[1].splitlines()
    assert values[0].startswith(f"  weight of {names[3]}: max |a - b| nan, 1 of ")
    assert values[1].startswith(f"  weight of {names[4]}: max |a - b| inf, 1 of ")
    assert values[2].startswith(f"  weight of {names[2]}: max |a - b| 2, 2 of ")
    assert values[3].startswith(f"  weight of {names[0]}: max |a - b| 0.0") and len(values) == 4
    lines = checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "b", "--values", "--top", "1", code=1)
    assert lines[-1] == "  and 3 more tensors"


def test_values_are_compared_in_blocks(tmp_path, monkeypatch):
    from megatron_ds.checkpoint import compare

    monkeypatch.setattr(compare, "BLOCK", 7)
    a, b = state(1), state(2)
    save(tmp_path / "a", 1, dict(a), tensor_ranks=2)
    save(tmp_path / "b", 1, dict(b), data_ranks=3)
    found = {
        (one.name, one.kind): (one.differing, one.elements, one.largest)
        for one in compare.value_differences(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))
    }
    assert found == {
        key: (int((a[key] != b[key]).sum()), a[key].numel(), (a[key].double() - b[key].double()).abs().max().item())
        for key in a
        if not torch.equal(a[key], b[key])
    }


# --- average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "steps"), [(["--last", "2"], [200, 300]), (["--steps", "300", "100", "200"], [100, 200, 300])]
)
def test_the_mean_of_weights_is_a_checkpoint_of_weights(capsys, monkeypatch, run, tmp_path, which, steps):
    from megatron_ds.checkpoint import mean

    monkeypatch.setattr(mean, "BLOCK", 100)
    lines = checkpoint(capsys, "average", "--load", run, *which, "--output", tmp_path / "mean")
    assert "weights only, fp32" in lines[0] and lines[1].startswith(
        f"use it as --load {tmp_path / 'mean'} of export-hf"
    )
    found, states = open_checkpoint(tmp_path / "mean"), [state(step) for step in steps]
    assert found.step == 300 and found.config == open_checkpoint(run / "checkpoints").config
    assert found.trainer == {
        "step": 300, "consumed_samples": 2400, "consumed_tokens": 300_000, "train_loss": None, "eval": {},
        "averaged_steps": steps,
    }  # fmt: skip
    for name in found.shapes():
        expected = torch.stack([one[name, "weight"].double() for one in states]).mean(0)
        assert found.kinds(name) == ["weight"]
        assert torch.equal(found.read(name), expected.float())
    assert f" mean of {', '.join(map(str, steps))} no latest" in rows(checkpoint(capsys, "ls", tmp_path / "mean"))[0]


def test_the_mean_is_what_a_run_can_begin_with_and_an_export_takes(run, tmp_path):
    assert main(["checkpoint", "average", "--load", str(run), "--last", "2", "--output", str(tmp_path / "mean")]) == 0
    found = open_checkpoint(tmp_path / "mean")
    ours = read_config(found).megatron_ds
    check_tensors(found, ours.model, ours.moe)
    export(found, tmp_path / "exported", ExportOptions())
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "qwen3"


def test_what_cannot_be_averaged(run, tmp_path):
    target = str(tmp_path / "mean")
    for which, message in [
        (["--last", "4"], r"^--last 4: .*run has 3 checkpoints$"),
        (["--steps", "100", "150"], r"^step 150: no such checkpoint in .*/checkpoints; it has 100, 200, 300$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            main(["checkpoint", "average", "--load", str(run), *which, "--output", target])
    with pytest.raises(ConfigError, match=r"^--output .*/checkpoints: exists and is not empty; name a new directory$"):
        main(["checkpoint", "average", "--load", str(run), "--last", "2", "--output", str(run / "checkpoints")])
    save(run / "checkpoints", 400, state(4) | {("more", "weight"): torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"global_step300 and .*global_step400 hold different models"):
        main(["checkpoint", "average", "--load", str(run), "--last", "2", "--output", target])
    shard = run / "checkpoints" / "global_step400" / "shard_00000_000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"shard_00000_000\.safetensors: sha256 differs"):
        main(["checkpoint", "average", "--load", str(run), "--last", "1", "--output", target])
    assert not (tmp_path / "mean").exists()


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["ls", "verify", "diff", "average"])
def test_every_action_has_help_with_an_example(capsys, action):
    with pytest.raises(SystemExit) as done:
        main(["checkpoint", action, "--help"])
    assert done.value.code == 0
    assert f"example:\n  megatron-ds checkpoint {action} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: ACTION; see megatron-ds checkpoint --help"),
        (["list"], "argument ACTION: invalid choice: 'list' (choose from "),
        (["ls"], "the following arguments are required: DIR; see megatron-ds checkpoint ls --help"),
        (["ls", "nothing"], "nothing: no global_step* directory; give a save directory, or a run directory such as"),
        (
            ["verify", "nothing", "--step", "x"],
            "argument --step: must be a step, not x; see megatron-ds checkpoint verify",
        ),
        (["average", "--load", "a", "--output", "b"], "one of the arguments --last --steps is required; see"),
        (
            ["average", "--load", "a", "--last", "0", "--output", "b"],
            "argument --last: must be a whole number from 1 on",
        ),
        (["diff", "a", "b", "--top", "-1"], "argument --top: "),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message):
    with pytest.raises(ConfigError) as caught:
        main(["checkpoint", *argv])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
