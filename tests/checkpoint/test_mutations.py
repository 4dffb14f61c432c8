"""A thousand random changes of a checkpoint's files: each is found and named; a thousand harmless ones are not."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_tools import any_bits, fragments_of, on_ranks

from megatron_ds.checkpoint.manifest import MANIFEST, Manifest
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
from megatron_ds.errors import CheckpointError

STEP, OTHER = "global_step20", "global_step10"
NEW_NAMES = ["shard_00009_000.safetensors", "rank_00007.safetensors", ".hidden", "a b\n", "tokenizer/new", "x/y/z.pt"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Two steps of two ranks, with files of the same length, of no length, and in folders."""
    directory = tmp_path_factory.mktemp("clean")
    tokenizer = directory / "tokenizer"
    (tokenizer / "more").mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text('{"vocabulary": []}')
    (tokenizer / "empty").write_text("")
    (tokenizer / "more" / "merges.txt").write_text("a b\n")

    def save(peers, step):
        parts = [fragments_of(any_bits((7, 6), torch.float32, step), kind=k, parts=2) for k in ("weight", "exp_avg")]
        CheckpointStore(directory / "saved", peers).save(
            step,
            [part[peers.rank] for part in parts],
            rank_state={"torch": torch.arange(5) + peers.rank},
            trainer={"step": step},
            config={"megatron_ds": {"generation": "v1"}},
            extra_files={"tokenizer": tokenizer},
        )

    for step in (10, 20):
        assert on_ranks(2, lambda peers, step=step: save(peers, step)) == [None, None]
    return directory / "saved"


@pytest.fixture
def copy(clean, tmp_path):
    """Makes fresh copies of the two steps, one at a time; perhaps of the other step only the manifest."""

    def make(only_manifest=False):
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        if not only_manifest:
            return shutil.copytree(clean, directory)
        shutil.copytree(clean / STEP, directory / STEP)
        (directory / OTHER).mkdir()
        shutil.copyfile(clean / OTHER / MANIFEST, directory / OTHER / MANIFEST)
        return directory

    return make


def files_of(step: Path) -> list[str]:
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def flip_a_bit(step, name, chance):
    content = bytearray((step / name).read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    (step / name).write_bytes(content)


def truncate(step, name, chance):
    os.truncate(step / name, chance.randrange((step / name).stat().st_size))


def extend(step, name, chance):
    with (step / name).open("ab") as file:
        file.write(chance.choice([b"\0", b" ", b"\n", chance.randbytes(9)]))


def delete(step, name, chance):
    (step / name).unlink()


def swap_two(step, name, chance):
    mine = (step / name).read_bytes()
    other = chance.choice([other for other in files_of(step) if (step / other).read_bytes() != mine])
    (step / name).write_bytes((step / other).read_bytes())
    (step / other).write_bytes(mine)
    return name, other


def rename(step, name, chance):
    target = chance.choice([f"{name}.bak", name.upper() + "_", "renamed", f"tokenizer/{Path(name).name}_"])
    (step / target).parent.mkdir(parents=True, exist_ok=True)
    (step / name).rename(step / target)
    return name, target


def add_a_file(step, name, chance):
    new = chance.choice(NEW_NAMES)
    (step / new).parent.mkdir(parents=True, exist_ok=True)
    (step / new).write_bytes(chance.choice([b"", b"x", (step / name).read_bytes()]))
    return (new,)


def add_an_empty_directory(step, name, chance):
    new = chance.choice(["empty_directory", "tokenizer/empty_directory", "a/b/c", ".git"])
    (step / new).mkdir(parents=True)
    return (new,)


def link_to_an_identical_copy(step, name, chance):
    outside = step.parent / "outside"
    (step / name).rename(outside)
    (step / name).symlink_to(chance.choice([outside, os.path.relpath(outside, (step / name).parent)]))


def link_a_folder_to_an_identical_copy(step, name, chance):
    folder = chance.choice(["tokenizer", "tokenizer/more"])
    (step / folder).rename(step.parent / "outside")
    (step / folder).symlink_to(step.parent / "outside")
    return (folder,)


def swap_manifests_of_two_steps(step, name, chance):
    mine, other = step / MANIFEST, step.parent / OTHER / MANIFEST
    content = mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return (MANIFEST,)


def make_a_pipe(step, name, chance):
    (step / name).unlink()
    os.mkfifo(step / name)


def make_a_directory(step, name, chance):
    (step / name).unlink()
    (step / name).mkdir()


MUTATIONS = [
    flip_a_bit, truncate, extend, delete, swap_two, rename, add_a_file, add_an_empty_directory,
    link_to_an_identical_copy, link_a_folder_to_an_identical_copy, swap_manifests_of_two_steps, make_a_pipe,
    make_a_directory,
]  # fmt: skip


def test_a_thousand_mutations_are_found_and_named(copy):
    chance, done = random.Random(0), Counter()
    while done.total() < 1000:
        directory = copy(only_manifest=True)
        step, mutate = directory / STEP, MUTATIONS[done.total() % len(MUTATIONS)]
        name = chance.choice([name for name in files_of(step) if (step / name).stat().st_size])
        touched = mutate(step, name, chance) or (name,)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(step)
        said = str(caught.value)
        expected = [MANIFEST] if MANIFEST in touched else touched
        assert all(f"{name}: " in said or f"{name}/" in said for name in expected), (mutate.__name__, touched, said)
        done[mutate.__name__] += 1
    assert min(done.values()) > 70


def test_a_newer_damaged_step_is_passed_over_by_name(copy):
    chance = random.Random(1)
    for mutate in MUTATIONS:
        directory = copy()
        if mutate is swap_manifests_of_two_steps:
            continue  # then neither is whole
        touched = mutate(directory / STEP, "shard_00001_000.safetensors", chance) or ("shard_00001_000.safetensors",)
        found = open_checkpoint(directory)
        assert found.step == 10 and len(found.rejected) == 1
        assert STEP in found.rejected[0] and any(name in found.rejected[0] for name in touched)


def harmless(step, chance):
    """A change that leaves every name and byte as it was."""
    path = step / chance.choice(files_of(step))
    match chance.randrange(6):
        case 0:
            path.chmod(chance.choice([0o400, 0o444, 0o600, 0o640, 0o777]))
        case 1:
            os.utime(path, (chance.randrange(2**31), chance.randrange(2**31)))
        case 2:
            path.chmod(0o600)
            path.write_bytes(path.read_bytes())
        case 3:
            path.rename(step.parent / "aside")
            (step.parent / "aside").rename(path)
        case 4:
            os.link(path, step.parent / f"link{chance.random()}")
        case 5:
            path.parent.chmod(chance.choice([0o700, 0o755, 0o777]))


def test_a_thousand_checks_of_clean_ones_raise_nothing(copy):
    chance, directory = random.Random(2), copy()
    for number in range(1000):
        step = directory / (STEP, OTHER)[number % 2]
        harmless(step, chance)
        assert open_checkpoint(step).step == (20, 10)[number % 2]
    assert open_checkpoint(directory).rejected == []


def test_what_may_not_be_read_is_named(copy, monkeypatch):
    directory, real = copy(), open

    def refuse(path, *arguments, **options):
        if str(path).endswith("trainer.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"trainer\.json: unreadable \(\[Errno 13\] Permission denied\)"):
        open_checkpoint(directory / STEP)


def test_every_bad_file_is_listed(copy):
    step = copy() / STEP
    for name in files_of(step):
        if name != MANIFEST:
            (step / name).write_bytes(b"changed")
    manifest = Manifest.read(step)
    lines = manifest.problems(step, manifest.files, hashes=True)
    assert [line.partition(": ")[0] for line in lines] == [name for name in files_of(step) if name != MANIFEST]
