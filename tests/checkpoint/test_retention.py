"""Retention: which steps go, never the last whole one, and only after the newest was read back."""

import pytest
import torch
from checkpoint_tools import fragments_of
from hypothesis import given
from hypothesis import strategies as st

from megatron_ds.checkpoint.retention import Retention, validation_losses
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.errors import CheckpointError


def save(directory, step, loss=None):
    CheckpointStore(directory, SingleProcess()).save(
        step, fragments_of(torch.full((4,), float(step))), rank_state={},
        trainer={"step": step, "eval": {"a": loss, "b": loss} if loss is not None else {}}, config={},
    )  # fmt: skip


def steps(directory):
    return sorted(int(path.name.removeprefix("global_step")) for path in directory.glob("global_step*[0-9]"))


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(), []),
        (Retention(keep_best=True, retain_interval=20), []),
        (Retention(keep_last=1), [10, 20, 30, 40]),
        (Retention(keep_last=2), [10, 20, 30]),
        (Retention(keep_last=9), []),
        (Retention(keep_last=1, retain_interval=20), [10, 30]),
        (Retention(keep_last=1, keep_best=True), [10, 20, 40]),
        (Retention(keep_last=2, retain_interval=20, keep_best=True), [10]),
    ],
)
def test_rules_add_up(retention, gone):
    losses = {10: None, 20: 3.0, 30: 2.0, 40: 2.5, 50: 2.5, 60: 1.0}
    assert retention.surplus(50, losses) == gone, "60 is beyond the newest: another branch, the user's"


@given(
    st.dictionaries(st.integers(0, 60), st.none() | st.floats(0, 9), min_size=1),
    st.none() | st.integers(1, 5), st.none() | st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_the_newest_always_stays(losses, last, interval, best):
    newest = max(losses)
    gone = Retention(last, interval, best).surplus(newest, losses)
    assert newest not in gone and set(gone) <= set(losses)
    assert last is None or len(losses) - len(gone) >= min(last, len(losses))


def test_surplus_is_removed_and_said(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        save(tmp_path, step, loss)
    assert validation_losses(tmp_path) == {1: 3.0, 2: 1.0, 3: 2.0, 4: None}
    store = CheckpointStore(tmp_path, SingleProcess())
    assert Retention(1, None, True).apply(store, 4) == ["removed the checkpoints of steps 1, 3"]
    assert steps(tmp_path) == [2, 4]
    assert Retention(1, None, True).apply(store, 4) == []
    assert open_checkpoint(tmp_path).step == 4


def test_nothing_goes_when_the_newest_is_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shard = next((tmp_path / "global_step2").glob("shard_*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name):
        Retention(keep_last=1).apply(CheckpointStore(tmp_path, SingleProcess()), 2)
    assert steps(tmp_path) == [1, 2]


def test_a_damaged_older_one_does_not_stop_it(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, 1.0)
    (tmp_path / "global_step1" / "trainer.json").write_text("{")
    (tmp_path / "global_step2" / "trainer.json").unlink()
    Retention(keep_last=1).apply(CheckpointStore(tmp_path, SingleProcess()), 3)
    assert steps(tmp_path) == [3]


def test_half_a_removal_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    store = CheckpointStore(tmp_path, SingleProcess())

    def stop(path):
        raise OSError("killed")

    monkeypatch.setattr("megatron_ds.checkpoint.writing.shutil.rmtree", stop)
    with pytest.raises(CheckpointError, match="killed"):
        Retention(keep_last=1).apply(store, 2)
    monkeypatch.undo()
    assert steps(tmp_path) == [2]
    found = open_checkpoint(tmp_path)
    assert (found.step, found.rejected) == (2, [])
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_going_back_is_seen(tmp_path):
    store = CheckpointStore(tmp_path / "new", SingleProcess())
    assert store.left_at() is None
    for step in (1, 2, 3):
        save(tmp_path / "new", step)
    assert store.left_at() is None
    (tmp_path / "new" / "latest").write_text("global_step2")
    assert store.left_at() == 2


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "global_step1").rename(tmp_path / "global_step7")
    with pytest.raises(CheckpointError, match="is of step 1"):
        open_checkpoint(tmp_path)
