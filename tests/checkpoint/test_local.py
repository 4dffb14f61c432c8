"""The node-local tier: parts on many disks, their copies, and what of them still makes a checkpoint."""

import json
import os
import random
import shutil
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from checkpoint_tools import damage, fragments_of, on_ranks, same_bits
from local_tools import all_of, directories, found, on_any_disk, save, save_of, store_of, tensor_of, value_in

from megatron_ds.checkpoint.manifest import Manifest
from megatron_ds.checkpoint.parts import Save, current, list_parts
from megatron_ds.checkpoint.store import open_checkpoint
from megatron_ds.errors import CheckpointError


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Nothing here is about what survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("world", [[1], [3], [2, 1], [1, 2, 1]], ids=str)
def test_each_node_keeps_its_own_and_everything_comes_back(tmp_path, world):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab").write_text("a b")
    reports = save(tmp_path, 20, 3, world, extra_files={"tokenizer": tmp_path / "tokenizer"})
    ranks = iter(range(sum(world)))
    for node, count in enumerate(world):
        part = tmp_path / f"disk{node}/node{node}/global_step20"
        own = list(islice(ranks, count))
        expected = {"config.json", "trainer.json", "manifest.json"} | ({"tokenizer"} if node == 0 else set())
        expected |= {f"rank_{rank:05d}.safetensors" for rank in own}
        expected |= {f"shard_{rank:05d}_000.safetensors" for rank in own}
        assert {path.name for path in part.iterdir()} == expected
        assert {reports[rank].path for rank in own} == {part}
        manifest = Manifest.read(part)
        assert manifest.world_size == sum(world) and manifest.step == 20
        assert (manifest.part.node, manifest.part.nodes, manifest.part.sequence) == (node, len(world), 1)
    size = sum(path.stat().st_size for path in tmp_path.glob("disk*/**/*") if path.is_file())
    assert {report.bytes for report in reports} == {size} and all(report.problems == () for report in reports)
    assert len({Manifest.read(path).part.save for path in tmp_path.glob("disk*/node*/*")}) == 1
    assert found(tmp_path, world) == ({20: 3}, [])

    def read(peers):
        store = store_of(tmp_path, peers)
        assert store.steps() == ([20], [])
        with store.open(
            20, lambda _: {f"rank_{peers.rank:05d}.safetensors", "tokenizer/vocab", "absent"}
        ) as checkpoint:
            assert torch.equal(checkpoint.rank_state(peers.rank)["torch"], torch.tensor([peers.rank, 3]))
            assert (checkpoint.path / "tokenizer/vocab").read_text() == "a b"
            return checkpoint.path

    paths = on_ranks(world, read)
    assert not any(path.exists() for path in paths)
    assert directories(tmp_path) == [f"disk{node}/node{node}/global_step20" for node in range(len(world))]


def test_other_ranks_and_nodes_read_it_from_disks_in_any_order(tmp_path):
    save(tmp_path, 4, 1, [2, 1, 1])
    for world, disks in [([1, 1, 1], None), ([1, 2, 1], [2, 0, 1]), ([1, 1, 1, 2], [3, 1, 0, 2])]:
        assert found(tmp_path, world, disks) == ({4: 1}, [])
    for disk in (1, 2):
        shutil.copytree(tmp_path / f"disk{disk}", tmp_path / "disk0", dirs_exist_ok=True)
    assert found(tmp_path, [2]) == ({4: 1}, [])


def test_only_what_is_needed_and_not_there_is_fetched_and_once_per_node(tmp_path):
    save(tmp_path, 4, 1, [1, 1, 1], neighbour=True)
    received = []

    def work(peers):
        store = store_of(tmp_path, peers)
        original = peers.receive
        peers.receive = lambda size, source: (received.append((peers.node, size)), original(size, source))[1]
        store.steps()
        wanted = [(0, 10), (0, 10), (30, 5), (30, 5)][peers.rank]
        box = ((0, 7), (0, 5))
        with store.open(4, lambda index: index.overlapping("w", "weight", box, *wanted)) as checkpoint:
            values = checkpoint.read_range("w", "weight", box, *wanted)
            assert same_bits(values, tensor_of(1).view(-1)[wanted[0] : sum(wanted)])
            return sorted(path.name for path in checkpoint.path.glob("shard*"))

    first, second, third = (f"shard_0000{rank}_000.safetensors" for rank in range(3))
    # Disk 0 has part 0 and a copy of part 2, disk 1 part 1 and a copy of part 0; the ranks of node 1 both need part 2.
    assert on_ranks([2, 2], work) == [[first, third], [first, third], [first, second, third], [first, second, third]]
    assert [(1, (tmp_path / f"disk0/node0/neighbour/global_step4/{third}").stat().st_size)] == received


def test_a_lost_disk_without_copies(tmp_path):
    save(tmp_path, 1, 1, [1, 2])
    save(tmp_path, 2, 2, [1, 2])
    shutil.rmtree(tmp_path / "disk1")
    assert found(tmp_path, [1, 2]) == (
        {},
        [f"step {step}: no disk has a whole part of node 1 (of 2)" for step in (2, 1)],
    )
    assert found(tmp_path, [1]) == ({}, found(tmp_path, [1, 2])[1])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_disk_comes_back_from_its_neighbour(tmp_path, lost):
    for step in (1, 2, 3):
        assert all(report.problems == () for report in save(tmp_path, step, step, [2, 1, 1], neighbour=True))
    shutil.rmtree(tmp_path / f"disk{lost}")
    assert found(tmp_path, [2, 1, 1]) == ({3: 3, 2: 2}, [])
    others = [node for node in range(3) if node != lost]
    assert found(tmp_path, [1, 2], others) == ({3: 3, 2: 2}, []), "the other two go on alone"
    save(tmp_path, 4, 4, [2, 1, 1], neighbour=True)
    assert found(tmp_path, [2, 1, 1]) == ({4: 4, 3: 3}, [])
    shutil.rmtree(tmp_path / f"disk{(lost + 1) % 3}")
    steps, lines = found(tmp_path, [2, 1, 1])
    assert steps == {4: 4} and lines == [f"step 3: no disk has a whole part of node {lost} (of 3)"]


def test_a_copy_is_the_part_byte_for_byte(tmp_path):
    save(tmp_path, 5, 1, [2, 1], neighbour=True)
    for node in range(2):
        part = tmp_path / f"disk{node}/node{node}/global_step5"
        copy = tmp_path / f"disk{1 - node}/node{1 - node}/neighbour/global_step5"
        assert {path.name: path.read_bytes() for path in part.iterdir()} == {
            path.name: path.read_bytes() for path in copy.iterdir()
        }
    save(tmp_path / "alone", 5, 1, [2], neighbour=True)
    assert directories(tmp_path / "alone") == ["disk0/node0/global_step5"], "there is no next node"


def test_nodes_that_share_a_disk_keep_apart(tmp_path):
    for step in range(5):
        save(tmp_path, step, step, [2, 1, 1], disks=[0, 0, 0], neighbour=True)
    expected = [
        f"disk0/node{node}/{folder}global_step{step}"
        for node, folder, step in product(range(3), ("", "neighbour/"), (3, 4))
    ]
    assert directories(tmp_path) == sorted(expected)
    assert found(tmp_path, [2, 1, 1], [0, 0, 0]) == ({4: 4, 3: 3}, [])
    shutil.rmtree(tmp_path / "disk0/node1")
    assert found(tmp_path, [2, 1, 1], [0, 0, 0]) == ({4: 4, 3: 3}, [])


def test_the_newest_stay_and_folders_of_former_nodes_are_cleared(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, step, [1, 1, 1], keep=1 if step == 20 else 2)
        kept = {10: [10], 20: [20], 30: [20, 30]}[step]
        assert directories(tmp_path) == [f"disk{n}/node{n}/global_step{s}" for n in range(3) for s in kept]
    save(tmp_path, 40, 40, [1, 1], [1, 2])
    assert found(tmp_path, [1, 1, 1])[0] == {40: 40}, "without a part on disk 0 the rest of step 30 is of no use"
    save(tmp_path, 50, 50, [1, 1], [1, 2])
    expected = [f"disk{node + 1}/node{node}/global_step{step}" for node in range(2) for step in (40, 50)]
    assert [path for path in directories(tmp_path) if not path.startswith("disk0")] == expected
    assert found(tmp_path, [1, 1], [1, 2]) == ({50: 50, 40: 40}, [])


def test_parts_of_two_saves_of_one_step_are_never_mixed(tmp_path):
    save(tmp_path, 5, 1)
    shutil.copytree(tmp_path / "disk1", tmp_path / "before")
    save(tmp_path, 5, 2)
    assert found(tmp_path) == ({5: 2}, [])
    shutil.rmtree(tmp_path / "disk1")
    (tmp_path / "before").rename(tmp_path / "disk1")
    steps, lines = found(tmp_path)
    assert steps == {} and sorted(lines) == [
        f"step 5: no disk has a whole part of node {node} (of 2)" for node in (0, 1)
    ]
    save(tmp_path, 5, 3)
    assert found(tmp_path) == ({5: 3}, [])


def test_saves_are_in_the_order_in_which_they_were_made(tmp_path):
    for step in (80, 90, 100):
        save(tmp_path, step, step, keep=3)
    shutil.copytree(tmp_path, tmp_path.parent / "later")
    save(tmp_path.parent / "later", 85, 1)  # the run went back to 80
    assert found(tmp_path.parent / "later") == ({85: 1, 80: 80}, [])
    for path in tmp_path.glob("disk*/node*/*"):  # as if it had died before removing anything
        shutil.copytree(path, tmp_path.parent / "later" / path.relative_to(tmp_path), dirs_exist_ok=True)
    steps, lines = found(tmp_path.parent / "later")
    assert steps == {85: 1, 80: 80}
    assert lines == [
        f"step {step}: from before step 85 was saved; it belongs to a branch that was left" for step in (100, 90)
    ]


def test_current_saves_descend_in_both_orders():
    chance = random.Random(0)
    for _ in range(200):
        saves = [Save(n, "", chance.randrange(8), 1, 1) for n in range(chance.randrange(7))]
        expected = [save for save in saves if not any(later.step <= save.step for later in saves if later > save)]
        assert current(chance.sample(saves, len(saves))) == expected[::-1]


# --- what is refused at save -----------------------------------------------------------------------------------------


def test_a_save_that_would_not_load_is_refused_on_all_ranks(tmp_path):
    save(tmp_path, 1, 1, [1, 1])

    def attempt(fragments_by_rank, **options):
        def work(peers):
            arguments = {"rank_state": {}, "trainer": {}, "config": {}, **options}
            return store_of(tmp_path, peers).save(2, fragments_by_rank(peers.rank), **arguments)

        errors = on_ranks([1, 1], work)
        assert all(isinstance(error, CheckpointError) for error in errors), errors
        assert len(set(on_any_disk(map(str, errors)))) == 1
        assert directories(tmp_path) == ["disk0/node0/global_step1", "disk1/node1/global_step1"]
        return str(errors[0])

    parts = fragments_of(torch.zeros(6), parts=2)
    assert "3 of 6 elements of weight of w are missing" in attempt(lambda rank: parts[:1] if rank else [])
    other = [parts[0], fragments_of(torch.zeros(6).double(), parts=2)[1]]
    assert "differ in full shape or dtype" in attempt(lambda rank: other[rank : rank + 1])
    assert "No such file" in attempt(lambda rank: [], extra_files={"tokenizer": tmp_path / "none"})
    taken = {"shard_00001_000.safetensors": Path(__file__)}
    assert "name of a checkpoint file" in attempt(lambda rank: parts[rank : rank + 1], extra_files=taken)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_fails_in_any_way_and_all_say_so(tmp_path, failing):
    save(tmp_path, 1, 1, [2, 1])
    save(tmp_path, 2, 2, [2, 1])
    reasons = [OSError(28, "No space left on device"), RuntimeError("CUDA error"), MemoryError()]

    def work(peers):
        store, messages = store_of(tmp_path, peers), []
        for reason in reasons:

            def produce(reason=reason):
                yield fragments_of(torch.zeros(9), parts=3)[peers.rank]
                if peers.rank == failing:
                    raise reason

            with pytest.raises(CheckpointError) as caught:
                store.save(2, produce(), rank_state={}, trainer={}, config={})
            messages.append(str(caught.value))
        return messages

    results = on_ranks([2, 1], work)
    assert on_any_disk(results[0]) == on_any_disk(results[1]) == on_any_disk(results[2])
    for messages in results:
        for message, reason in zip(messages, reasons, strict=True):
            assert message.startswith("saving step 2 to ") and message.endswith("earlier checkpoints are untouched")
            assert (str(reason) or "MemoryError()") in message and f"(rank {failing})" in message
    assert found(tmp_path, [2, 1]) == ({2: 2, 1: 1}, [])
    assert not [path for path in directories(tmp_path) if "tmp" in path]


# --- what is found -------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    assert found(tmp_path, [1, 1]) == ({}, [])
    (tmp_path / "disk0/node0/global_step5.tmp").mkdir(parents=True)
    (tmp_path / "disk0/node0/global_step07").mkdir()
    assert found(tmp_path, [1, 1]) == ({}, [])

    def work(peers):
        with store_of(tmp_path, peers).open(5, all_of):
            pass

    assert all("step 5 of" in str(error) and error.exit_code == 4 for error in on_ranks([1, 1], work))


def test_three_hundred_random_mutations_are_all_found(tmp_path):
    save(tmp_path, 1, 1, [2, 1], neighbour=True)
    save(tmp_path, 2, 2, [2, 1], neighbour=True)
    chance = random.Random(0)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def steps(peers):
        found_steps, lines = store_of(tmp_path, peers).steps()
        return found_steps, on_any_disk(lines)

    for _ in range(300):
        target = chance.choice(files)
        content, node, part = target.read_bytes(), int(target.relative_to(tmp_path).parts[0][-1]), target.parent
        damaged = damage(target, chance, files)
        results = on_ranks([2, 1], steps)
        assert results[0] == results[1] == results[2]
        assert results[0][0] == [2, 1], "the copy, or the original, is left"
        place = "disk" / part.relative_to(tmp_path / f"disk{node}")
        [line] = results[0][1]
        assert f"{place} on node {node}: " in line and (damaged.name in line or damaged.name == "manifest.json")
        target.write_bytes(content)
        (part / "zzz").unlink(missing_ok=True)
    assert found(tmp_path, [2, 1]) == ({2: 2, 1: 1}, [])


def test_damage_of_part_and_copy_falls_back_to_an_earlier_step(tmp_path):
    save(tmp_path, 1, 1, neighbour=True)
    save(tmp_path, 2, 2, neighbour=True)
    for path in tmp_path.glob("**/global_step2/shard_00001_000.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    steps, lines = found(tmp_path)
    assert steps == {1: 1} and len(lines) == 3
    for line, place, node in zip(lines, ("disk/node0/neighbour", "disk/node1"), (0, 1)):
        assert line.startswith(f"{tmp_path}/{place}/global_step2 on node {node}: shard_00001_000.safetensors: has")
    assert lines[-1] == "step 2: no disk has a whole part of node 1 (of 2)"


def test_directories_that_are_no_parts_are_named(tmp_path):
    save(tmp_path, 1, 1, [1])
    home = tmp_path / "disk0/node0"
    (home / "global_step3").symlink_to(home / "global_step1")
    (home / "global_step4").mkdir()
    manifest = Manifest(step=5, world_size=1, files={})
    (home / "global_step5").mkdir()
    (home / "global_step5/manifest.json").write_bytes(manifest.encode())
    steps, lines = found(tmp_path, [1])
    assert steps == {1: 1}
    assert [line.split(" on node 0: ")[1][:28] for line in lines] == [
        "symbolic links are refused", "manifest.json: missing; no c", "not a node's part of a check",
    ]  # fmt: skip
    save(tmp_path, 6, 6, [1])
    assert directories(tmp_path) == ["disk0/node0/global_step1", "disk0/node0/global_step6"]


def test_a_single_part_is_no_checkpoint_unless_it_is_the_only_one(tmp_path):
    save(tmp_path / "one", 1, 1, [2])
    assert same_bits(open_checkpoint(tmp_path / "one/disk0/node0").read("w"), tensor_of(1))
    save(tmp_path / "two", 1, 1, [1, 1])
    with pytest.raises(CheckpointError, match="17 of 35 elements of weight of w are missing"):
        open_checkpoint(tmp_path / "two/disk0/node0/global_step1")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_fails_while_opening_fails_everywhere_and_leaves_nothing(tmp_path):
    save(tmp_path, 1, 1, [2, 1])

    def work(peers):
        store = store_of(tmp_path, peers)
        store.steps()

        def unsure(index):
            if peers.rank == 1:
                index.overlapping("nothing", "weight", ((0, 7), (0, 5)), 0, 1)
            return set()

        with pytest.raises(CheckpointError, match=r"no weight of nothing.*\(rank 1\)"), store.open(1, unsure):
            pass
        with pytest.raises(CheckpointError, match="refused later"), store.open(1, all_of) as checkpoint:
            peers.gather_objects(checkpoint.read("w"))
            raise CheckpointError("refused later")
        peers.gather_objects(None)
        assert not list((tmp_path / f"disk{peers.node}").rglob("*.tmp"))
        assert value_in(store, 1) == 1
        save_of(store, 2, 2)
        with pytest.raises(CheckpointError, match="not known to be whole"), store.open(1, all_of):
            pass
        return store.steps()

    assert on_ranks([2, 1], work) == [([2, 1], [])] * 3


def test_a_file_that_is_damaged_on_its_way_is_noticed(tmp_path):
    save(tmp_path, 1, 1, [1, 1])

    def work(peers):
        store = store_of(tmp_path, peers)
        store.steps()
        send = peers.send
        peers.send = lambda byte_N, to: send(byte_N + 1 if peers.rank == 0 else byte_N, to)
        with store.open(1, all_of):
            pass

    errors = on_ranks([1, 1], work)
    assert len(set(on_any_disk(map(str, errors)))) == 1
    assert "shard_00000_000.safetensors: arrived with another sha256 (rank 1)" in str(errors[0])


def test_a_manifest_without_a_part_has_the_bytes_it_always_had(tmp_path):
    manifest = Manifest(step=7, world_size=2, files={})
    assert list(json.loads(manifest.encode())) == ["files", "format", "sha256", "step", "version", "world_size"]
    assert manifest.sha256 == "5f976df55b2136c79272675ffd74ab7984e431a1c07304cf4944da4ff51face2"
    save(tmp_path, 1, 1, [1])
    parts, problems = list_parts(tmp_path / "disk0")
    assert [part.place for part in parts] == ["node0/global_step1"] and problems == {}
    content = json.loads((tmp_path / "disk0/node0/global_step1/manifest.json").read_text())
    assert sorted(content["part"]) == ["node", "nodes", "save", "sequence"]
