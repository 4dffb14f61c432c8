"""Saving and finding: any split comes back under any other, damage is always found, every rank decides the same."""

import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch
from checkpoint_tools import (
    DTYPES,
    SHAPES,
    any_bits,
    cut,
    damage,
    fragments_of,
    on_ranks,
    requests,
    same_bits,
    splits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import manifest as manifest_module
from megatron_ds.checkpoint.manifest import MANIFEST, Manifest, seal, write_sealed
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import PIECES
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import CheckpointError

TENSORS = {
    ("layers.0.mlp.up.weight", "weight"): any_bits((7, 5), torch.bfloat16, 1),
    ("layers.0.mlp.up.weight", "exp_avg"): any_bits((7, 5), torch.float32, 2),
    ("layers.0.mlp.up.weight", "step"): torch.tensor(12.0),
    ("norm.weight", "weight"): any_bits((3,), torch.float32, 3),
    ("norm.weight", "momentum_buffer"): any_bits((3,), torch.float32, 4),
    ("empty", "weight"): any_bits((0, 4), torch.int64),
}


def save(directory, step, tensors=TENSORS, world_size=1, **options):
    """Save with every tensor cut over the ranks; the reports or errors in rank order."""

    def work(peers):
        fragments = [fragments_of(t, *key, parts=world_size)[peers.rank] for key, t in tensors.items()]
        return CheckpointStore(directory, peers, options.get("max_file_bytes", 4 << 30)).save(
            step,
            fragments,
            rank_state={"torch": torch.arange(5) + peers.rank},
            trainer=options.get("trainer", {"step": step, "consumed_samples": 8 * step, "wandb_id": "x1"}),
            config={"megatron_ds": {"generation": "v1"}},
            extra_files=options.get("extra_files"),
        )

    return on_ranks(world_size, work)


def newest(directory, world_size=1):
    """What every rank finds: (step, rejected) or the error's text; asserts that they agree."""
    found = on_ranks(world_size, lambda peers: CheckpointStore(directory, peers).newest())
    seen = [str(f) if isinstance(f, Exception) else f and (f.step, f.rejected) for f in found]
    assert seen.count(seen[0]) == world_size
    assert not isinstance(found[0], Exception) or isinstance(found[0], CheckpointError)
    return seen[0]


def assert_holds(checkpoint, tensors=TENSORS):
    for (name, kind), tensor in tensors.items():
        assert same_bits(checkpoint.read(name, kind), tensor)


@pytest.mark.parametrize("world_size", [1, 3])
def test_everything_comes_back(tmp_path, world_size):
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "more").mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "more/merges.txt").write_text("a b")
    reports = save(
        tmp_path / "c", 20, world_size=world_size, extra_files={"tokenizer": tokenizer, "card.md": Path(__file__)}
    )
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.path == tmp_path / "c" / "global_step20" and checkpoint.step == 20 and checkpoint.rejected == []
    assert checkpoint.trainer == {"step": 20, "consumed_samples": 160, "wandb_id": "x1"}
    assert checkpoint.config == {"megatron_ds": {"generation": "v1"}}
    assert_holds(checkpoint)
    assert checkpoint.shapes() == {"layers.0.mlp.up.weight": (7, 5), "norm.weight": (3,), "empty": (0, 4)}
    assert checkpoint.shapes("step") == {"layers.0.mlp.up.weight": ()}
    assert sorted(checkpoint.kinds("layers.0.mlp.up.weight")) == ["exp_avg", "step", "weight"]
    assert checkpoint.kinds("norm.weight") == ["weight", "momentum_buffer"] and checkpoint.kinds("nothing") == []
    for rank in range(world_size):
        assert torch.equal(checkpoint.rank_state(rank)["torch"], torch.arange(5) + rank)
    assert checkpoint.rank_state(world_size) is None
    assert (checkpoint.path / "tokenizer/more/merges.txt").read_text() == "a b"
    assert (checkpoint.path / "card.md").read_bytes() == Path(__file__).read_bytes()
    assert (tmp_path / "c/latest").read_bytes() == b"global_step20"
    assert (tmp_path / "c/latest_checkpointed_iteration.txt").read_bytes() == b"20"
    on_disk = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    assert all(report.bytes == on_disk and report.path == checkpoint.path for report in reports)
    assert all(0 < report.seconds < 30 for report in reports)


def test_only_safetensors_and_json_readable_by_their_own_libraries(tmp_path):
    save(tmp_path, 1, world_size=2)
    files = sorted(path.name for path in (tmp_path / "global_step1").iterdir())
    assert files == [
        "config.json", "manifest.json", "rank_00000.safetensors", "rank_00001.safetensors",
        "shard_00000_000.safetensors", "shard_00001_000.safetensors", "trainer.json",
    ]  # fmt: skip
    assert all(json.loads((tmp_path / "global_step1" / name).read_text()) for name in files if name.endswith("json"))
    shard = tmp_path / "global_step1/shard_00001_000.safetensors"
    half = load_file(shard)["weight/norm.weight"]
    assert same_bits(half, TENSORS["norm.weight", "weight"][2:])
    with safe_open(shard, "pt") as file:
        assert json.loads(file.metadata()["pieces"])["weight/norm.weight"] == {
            "name": "norm.weight", "kind": "weight", "shape": [3], "box": [[0, 3]], "start": 2, "length": 1,
        }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_split_over_ranks_reads_back_under_any_other(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("c")
    world_size = data.draw(st.integers(1, 3))
    shape, dtype = data.draw(SHAPES), data.draw(st.sampled_from(DTYPES))
    tensor = any_bits(shape, dtype)
    fragments = data.draw(splits(tensor, kind="exp_avg_sq"))
    owners = [data.draw(st.integers(0, world_size - 1)) for _ in fragments]
    limit = data.draw(st.integers(1, 300))

    def work(peers):
        mine = (fragment for fragment, owner in zip(fragments, owners) if owner == peers.rank)
        store = CheckpointStore(directory, peers, max_file_bytes=limit)
        return store.save(3, mine, rank_state={}, trainer={}, config={})

    assert [report.path for report in on_ranks(world_size, work)] == [directory / "global_step3"] * world_size
    checkpoint = open_checkpoint(directory)
    assert same_bits(checkpoint.read("w", "exp_avg_sq"), tensor)
    for _ in range(5):
        box, start, length = data.draw(requests(shape))
        assert same_bits(
            checkpoint.read_range("w", "exp_avg_sq", box, start, length), cut(tensor, box)[start : start + length]
        )
    assert checkpoint.rank_state(0) == {}


def test_files_are_split_and_lazy_fragments_do_not_pile_up(tmp_path):
    alive, peak = set(), 0

    class Watched(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def produce():
        nonlocal peak
        for number in range(12):
            tensor = torch.full((256,), float(number)).as_subclass(Watched)
            alive.add(id(tensor))
            peak = max(peak, len(alive))
            fragment = Fragment(f"w{number}", "weight", (256,), ((0, 256),), 0, tensor)
            del tensor
            yield fragment
            del fragment

    CheckpointStore(tmp_path, SingleProcess(), max_file_bytes=4096).save(
        1, produce(), rank_state={}, trainer={}, config={}
    )
    shards = sorted((tmp_path / "global_step1").glob("shard_*"))
    assert [path.name for path in shards] == [f"shard_00000_{part:03d}.safetensors" for part in range(3)]
    assert peak <= 6, "more than one file's worth of values was alive"
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.shapes()) == [f"w{number}" for number in range(12)]
    assert all(checkpoint.read(f"w{number}").eq(number).all() for number in range(12))


def test_reading_a_range_touches_only_overlapping_pieces(tmp_path):
    tensor = any_bits((30,), torch.float32)
    save(tmp_path, 1, {("w", "weight"): tensor}, world_size=3)
    checkpoint = open_checkpoint(tmp_path)
    mapped = []
    original = checkpoint._map
    checkpoint._map = lambda stored, want: mapped.append(stored.file) or original(stored, want)
    assert same_bits(checkpoint.read_range("w", "weight", ((0, 30),), 20, 10), tensor[20:])
    assert mapped == ["shard_00002_000.safetensors"]


def test_permissions_follow_the_umask_and_devices_and_strides_do_not_matter(tmp_path):
    old = os.umask(0o027)
    try:
        matrix = torch.arange(12.0).view(3, 4)
        column = matrix.t()[1]
        assert not column.is_contiguous()
        fragment = Fragment("w", "weight", (3,), ((0, 3),), 0, column.requires_grad_())
        store = CheckpointStore(tmp_path, SingleProcess())
        store.save(1, [fragment], rank_state={"t": matrix.t()}, trainer={}, config={})
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "global_step1").iterdir()}
    assert modes == {0o640}
    assert open_checkpoint(tmp_path).read("w").tolist() == [1.0, 5.0, 9.0]
    assert torch.equal(open_checkpoint(tmp_path).rank_state(0)["t"], matrix.t())


def test_replacing_a_step(tmp_path):
    save(tmp_path, 5)
    others = {key: any_bits(tuple(t.shape), t.dtype, 99) for key, t in TENSORS.items()}
    save(tmp_path, 5, others, world_size=2)
    assert_holds(open_checkpoint(tmp_path), others)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["global_step5", "latest", "latest_checkpointed_iteration.txt"]


# --- what is refused at save -----------------------------------------------------------------------------------------


def test_a_save_that_would_not_load_is_refused_on_all_ranks(tmp_path):
    save(tmp_path, 1)

    def attempt(fragments_by_rank, **options):
        def work(peers):
            arguments = {"rank_state": {}, "trainer": {}, "config": {}, **options}
            return CheckpointStore(tmp_path, peers).save(2, fragments_by_rank(peers.rank), **arguments)

        errors = on_ranks(2, work)
        assert all(isinstance(error, CheckpointError) for error in errors), errors
        assert str(errors[0]) == str(errors[1])
        assert newest(tmp_path) == (1, []) and not list(tmp_path.glob("*.tmp"))
        return str(errors[0])

    tensor = torch.zeros(6)
    parts = fragments_of(tensor, parts=2)
    assert "3 of 6 elements of weight of w are missing" in attempt(lambda rank: parts[:1] if rank else [])
    other = [parts[0], fragments_of(tensor.double(), parts=2)[1]]
    assert "differ in full shape or dtype" in attempt(lambda rank: other[rank : rank + 1])
    other = [parts[0], Fragment("w", "weight", (3, 2), ((0, 3), (0, 2)), 3, torch.zeros(3))]
    assert "differ in full shape or dtype" in attempt(lambda rank: other[rank : rank + 1])
    assert "No such file" in attempt(lambda rank: [], extra_files={"tokenizer": tmp_path / "none"})
    assert "'../up' is not a plain" in attempt(lambda rank: [], extra_files={"../up": tmp_path / "latest"})
    assert "name of a checkpoint file" in attempt(lambda rank: [], extra_files={"config.json": tmp_path / "latest"})

    def broken(rank):
        yield parts[rank]
        if rank == 1:
            raise OSError(28, "No space left on device")

    message = attempt(broken)
    assert message.startswith(f"saving {tmp_path}/global_step2 failed: [Errno 28] No space left on device (rank 1)")
    assert message.endswith("earlier checkpoints are untouched")


def test_directories_that_ranks_do_not_share_are_noticed(tmp_path):
    def work(peers):
        store = CheckpointStore(tmp_path / str(peers.rank), peers)
        if peers.rank == 1:  # as if an earlier run had left it there
            (tmp_path / "1/global_step1.tmp").mkdir(parents=True)
        return store.save(1, [], rank_state={}, trainer={}, config={})

    assert ["rank_00001.safetensors: missing" in str(error) for error in on_ranks(2, work)] == [True, True]
    for rank in range(2):
        save(tmp_path / f"own{rank}", 1, trainer={"rank": rank})
    errors = on_ranks(2, lambda peers: CheckpointStore(tmp_path / f"own{peers.rank}", peers).newest())
    assert all("not the same on all ranks" in str(error) for error in errors)


# --- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_there_is_none(tmp_path, world_size):
    assert newest(tmp_path / "absent", world_size) is None
    assert newest(tmp_path, world_size) is None
    (tmp_path / "global_step5.tmp").mkdir()
    (tmp_path / "global_step07").mkdir()
    (tmp_path / "latest").write_text("global_step5")
    assert newest(tmp_path, world_size) is None
    with pytest.raises(CheckpointError, match="no global_step"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("world_size", [1, 3])
def test_falls_back_to_the_newest_whole_one_and_names_the_rest(tmp_path, world_size):
    for step in (8, 9, 10):
        save(tmp_path, step, world_size=2)
    assert newest(tmp_path, world_size) == (10, [])
    (tmp_path / "global_step10/shard_00001_000.safetensors").unlink()
    step, rejected = newest(tmp_path, world_size)
    assert step == 9 and len(rejected) == 1
    assert f"{tmp_path}/global_step10: shard_00001_000.safetensors: missing" in rejected[0]
    (tmp_path / "global_step9/manifest.json").write_text("{")
    assert newest(tmp_path, world_size)[0] == 8 and len(newest(tmp_path, world_size)[1]) == 2
    (tmp_path / "global_step8/config.json").write_text("{}")
    message = newest(tmp_path, world_size)
    assert message.startswith(f"{tmp_path}: no checkpoint is whole")
    assert all(text in message for text in ("shard_00001", "manifest.json: unreadable", "config.json: has 2 bytes"))
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["global_step77", "nonsense", "", "\0\xff", "../global_step10", None])
def test_latest_may_say_anything(tmp_path, content):
    save(tmp_path, 4)
    save(tmp_path, 10)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content.encode("latin-1"))
    assert newest(tmp_path) == (10, [])
    (tmp_path / "latest").unlink(missing_ok=True)
    (tmp_path / "latest").mkdir()
    assert newest(tmp_path) == (10, [])


def test_latest_set_back_starts_a_branch_and_the_old_one_is_named(tmp_path):
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("global_step100\n")
    beyond = f"{tmp_path}/global_step200: beyond step 100, which {tmp_path}/latest names"
    assert newest(tmp_path) == (100, [beyond])
    save(tmp_path, 150)
    assert newest(tmp_path)[0] == 150
    shutil.rmtree(tmp_path / "global_step150")
    assert newest(tmp_path)[0] == 100
    shutil.rmtree(tmp_path / "global_step100")
    assert newest(tmp_path) == (200, [])


def test_a_step_directory_can_be_opened_under_any_name(tmp_path):
    save(tmp_path, 3)
    assert open_checkpoint(tmp_path / "global_step3").step == 3
    (tmp_path / "global_step3").rename(tmp_path / "best")
    checkpoints = on_ranks(2, lambda peers: open_checkpoint(tmp_path / "best", peers=peers))
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 3]


def test_without_verification_sizes_still_count(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "global_step3/config.json"
    path.write_bytes(path.read_bytes().replace(b"v1", b"v2"))
    assert open_checkpoint(tmp_path, verify=False).config == {"megatron_ds": {"generation": "v2"}}
    with pytest.raises(CheckpointError, match=r"config.json: sha256 differs"):
        open_checkpoint(tmp_path)
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"config.json: has 2 bytes"):
        open_checkpoint(tmp_path, verify=False)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_the_hashing(tmp_path, monkeypatch, world_size):
    save(tmp_path, 3, world_size=4)
    files = [path.name for path in (tmp_path / "global_step3").iterdir() if path.name != MANIFEST]
    hashed, digest = [], manifest_module._digest
    monkeypatch.setattr(manifest_module, "_digest", lambda path: (hashed.append(path.name), digest(path))[1])
    assert newest(tmp_path, world_size) == (3, [])
    assert sorted(hashed) == sorted(files)


def test_links_are_refused(tmp_path):
    save(tmp_path / "real", 3)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/global_step3").symlink_to(tmp_path / "real/global_step3")
    for path in (tmp_path / "linked", tmp_path / "linked/global_step3"):
        with pytest.raises(CheckpointError, match="symbolic links are refused"):
            open_checkpoint(path)
    (tmp_path / "way").symlink_to(tmp_path / "real")  # the way to the save directory may be one
    assert open_checkpoint(tmp_path / "way").step == 3
    save(tmp_path / "linked", 3)
    assert open_checkpoint(tmp_path / "linked").step == 3 and open_checkpoint(tmp_path / "real").step == 3


def test_pickled_files_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    step = tmp_path / "global_step9"
    step.mkdir()
    for name in ("mp_rank_00_model_states.pt", "layer_00-model_states.pt", "manifest.json", "trainer.json"):
        torch.save(Bomb(), step / name)
    for path in (tmp_path, step):
        with pytest.raises(CheckpointError, match=r"manifest.json: unreadable"):
            open_checkpoint(path, verify=False)
    save(tmp_path, 8)
    torch.save(Bomb(), tmp_path / "global_step8/shard_00000_000.safetensors")
    entries = {path.name: seal(path) for path in (tmp_path / "global_step8").iterdir() if path.name != MANIFEST}
    write_sealed(tmp_path / "global_step8" / MANIFEST, Manifest(step=8, world_size=1, files=entries).encode())
    with pytest.raises(CheckpointError, match=r"shard_00000_000.safetensors: unreadable"):
        open_checkpoint(tmp_path / "global_step8")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "other").mkdir()
    torch.save(Bomb(), tmp_path / "other/model.pt")
    with pytest.raises(CheckpointError, match="no global_step"):
        open_checkpoint(tmp_path / "other")


# --- what is wrong inside intact files --------------------------------------------------------------------------------


def forge(directory, shards):
    """A step whose files are intact but whose shards, (tensors, metadata) each, are as given."""
    directory.mkdir()
    for number, (tensors, metadata) in enumerate(shards):
        save_file(tensors, directory / f"shard_{number:05d}_000.safetensors", metadata)
    for name in ("config.json", "trainer.json"):
        (directory / name).write_text("{}")
    entries = {path.name: seal(path) for path in directory.iterdir()}
    write_sealed(directory / MANIFEST, Manifest(step=1, world_size=1, files=entries).encode())
    return directory


def described(tensor, box, start, shape=(2, 3)):
    piece = {"name": "w", "kind": "weight", "shape": shape, "box": box, "start": start, "length": tensor.numel()}
    return {"k": tensor}, {PIECES: json.dumps({"k": piece})}


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ([({"k": torch.zeros(2)}, None)], "piece descriptions"),
        ([({"k": torch.zeros(2)}, {PIECES: "{"})], "piece descriptions"),
        ([({"k": torch.zeros(2)}, {PIECES: '{"k": {"name": "w"}}'})], "piece descriptions"),
        ([({"other": torch.zeros(2)}, described(torch.zeros(2), [[0, 2], [0, 3]], 0)[1])], "piece descriptions"),
        ([({"k": torch.zeros(3)}, described(torch.zeros(2), [[0, 2], [0, 3]], 0)[1])], "another length"),
        ([described(torch.zeros(2), [[0, 2], [0, 4]], 0)], "not inside the shape"),
        ([described(torch.zeros(7), [[0, 2], [0, 3]], 0)], "not inside the 6 elements"),
        ([described(torch.zeros(5), [[0, 2], [0, 3]], 0)], "1 of 6 elements of weight of w are missing"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(tmp_path, shards, reason):
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(forge(tmp_path / "c", shards))


def test_contradicting_pieces_and_gaps_behind_overlaps_are_noticed_when_read(tmp_path):
    same = described(torch.arange(6.0), [[0, 2], [0, 3]], 0)
    assert open_checkpoint(forge(tmp_path / "same", [same, same])).read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    row = described(torch.tensor([3.0, 4.0, 9.0]), [[1, 2], [0, 3]], 0)
    checkpoint = open_checkpoint(forge(tmp_path / "other", [same, row]))
    with pytest.raises(CheckpointError, match="contradicts another piece"):
        checkpoint.read("w")
    assert checkpoint.read_range("w", "weight", ((0, 2), (0, 3)), 0, 5).tolist() == [0, 1, 2, 3, 4]
    left = described(torch.tensor([0.0, 3.0]), [[0, 2], [0, 1]], 0)
    top = described(torch.tensor([0.0, 1.0, 2.0]), [[0, 1], [0, 3]], 0)
    right = described(torch.tensor([2.0]), [[0, 2], [2, 3]], 0)
    checkpoint = open_checkpoint(forge(tmp_path / "gap", [left, top, right]))
    assert checkpoint.read_range("w", "weight", ((0, 2), (0, 1)), 0, 2).tolist() == [0, 3]
    with pytest.raises(CheckpointError, match="2 of 6 wanted elements of weight of w are missing"):
        checkpoint.read("w")


def test_unknown_tensors_and_impossible_ranges(tmp_path):
    save(tmp_path, 1)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no exp_avg_sq of norm.weight; it has weight, momentum_buffer"):
        checkpoint.read("norm.weight", "exp_avg_sq")
    with pytest.raises(CheckpointError, match=r"no weight of nrom.weight; no tensor has that name"):
        checkpoint.read("nrom.weight")
    with pytest.raises(ValueError, match="not inside"):
        checkpoint.read_range("norm.weight", "weight", ((0, 3),), 1, 3)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_thousand_random_mutations_are_all_found(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.json").write_text("{}")
    save(tmp_path / "c", 6, world_size=2, max_file_bytes=100, extra_files={"tokenizer": tmp_path / "t"})
    step, chance = tmp_path / "c/global_step6", random.Random(0)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    assert len(files) > 8

    for _ in range(1000):
        target = chance.choice(files)
        content = target.read_bytes()
        damaged = damage(target, chance, files)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(step)
        assert damaged.relative_to(step).as_posix() in str(caught.value)
        target.write_bytes(content)
        (target.parent / "zzz").unlink(missing_ok=True)
    for _ in range(20):
        assert_holds(open_checkpoint(step))
