"""The manifest notices any change of itself and of the files it lists, and never leaves its directory."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ds.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    list_names,
    plain_name,
    replace_file,
    seal,
    write_sealed,
)
from megatron_ds.errors import CheckpointError


def write(directory, files):
    """A directory with files and their manifest."""
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    entries = {name: write_sealed(directory / name, content) for name, content in files.items()}
    manifest = Manifest(step=7, world_size=2, files=entries)
    write_sealed(directory / MANIFEST, manifest.encode())
    return manifest


def problems(manifest, directory):
    return manifest.problems(directory, manifest.files, hashes=True) + manifest.strangers(directory)


def test_reads_what_it_wrote(tmp_path):
    manifest = write(tmp_path, {"a.json": b"{}", "tokenizer/b": b"", "c": bytes(range(256))})
    assert Manifest.read(tmp_path) == manifest
    assert problems(manifest, tmp_path) == []
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert content["step"] == 7 and content["world_size"] == 2 and content["version"] == 1
    assert content["files"]["c"]["size"] == 256
    assert content["files"]["tokenizer/b"]["sha256"].startswith("e3b0c44298fc1c14")  # SHA-256 of nothing


def test_every_flipped_bit_and_every_shorter_manifest_is_refused(tmp_path):
    write(tmp_path, {"a": b"1"})
    path, whole = tmp_path / MANIFEST, (tmp_path / MANIFEST).read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(tmp_path)


@given(st.binary(max_size=80) | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode))
def test_anything_else_is_refused_by_name(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("m")
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        Manifest.read(directory)


def test_deep_json_and_a_newer_version_are_refused(tmp_path):
    write(tmp_path, {"a": b"1"})
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="unreadable"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"version = 2: Input should be 1"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a//b", "./a", "", ".", "a\\b", "a\0b", MANIFEST])
def test_names_that_could_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(ValueError):
        plain_name(name)
    manifest = write(tmp_path, {"a": b"1"})
    content = json.loads(manifest.encode())
    content["files"][name] = content["files"].pop("a")
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="files"):
        Manifest.read(tmp_path)


def test_every_kind_of_damage_is_named(tmp_path):
    manifest = write(tmp_path, {"flipped": b"abc", "short": b"abc", "gone": b"abc", "linked": b"abc", "sub/pipe": b""})
    (tmp_path / "flipped").write_bytes(b"abd")
    (tmp_path / "short").write_bytes(b"ab")
    (tmp_path / "gone").unlink()
    (tmp_path / "linked").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "linked").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "sub/pipe").unlink()
    os.mkfifo(tmp_path / "sub/pipe")
    (tmp_path / "sub/extra").write_bytes(b"")
    (tmp_path / "folder").symlink_to(tmp_path.parent)
    assert problems(manifest, tmp_path) == [
        "flipped: sha256 differs",
        "gone: missing",
        "linked: is not a regular file",
        "short: has 2 bytes instead of 3",
        "sub/pipe: is not a regular file",
        "folder: is a symbolic link",
        "sub/extra: not in the manifest",
    ]
    assert manifest.problems(tmp_path, ["flipped"], hashes=False) == []


def test_a_linked_manifest_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    write(tmp_path / "there", {"a": b"1"})
    (tmp_path / MANIFEST).symlink_to(tmp_path / "there" / MANIFEST)
    with pytest.raises(CheckpointError, match="symbolic links are refused"):
        Manifest.read(tmp_path)


def test_list_names_sees_files_in_folders_and_links(tmp_path):
    write(tmp_path, {"a": b"", "b/c/d": b""})
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert sorted(list_names(tmp_path)) == ["a", "b/c/d", "b/up", MANIFEST]


def test_replace_file_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "latest").symlink_to(outside)
    replace_file(tmp_path / "latest", b"global_step3")
    assert outside.read_text() == "mine" and not (tmp_path / "latest").is_symlink()
    assert seal(tmp_path / "latest").size == 12
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "outside"]
