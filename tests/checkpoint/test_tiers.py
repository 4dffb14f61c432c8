"""Tiers: what is written is the snapshot, slow disks do not stop each other, and a failure is an outcome."""

import threading
import time

import pytest
import torch
from checkpoint_tools import fragments_of, on_ranks

from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.checkpoint.tiers import Followed, Outcome, Snapshot, Tier, TieredSaver
from megatron_ds.checkpoint.writing import Content, SaveReport
from megatron_ds.errors import CheckpointError


class Recorder:
    """A store that keeps what it is given, once the gate is open; it fails at the steps it is told."""

    def __init__(self, path):
        self.path, self.fails, self.error = path, (), CheckpointError("the disk is full")
        self.gate, self.saved = threading.Event(), {}
        self.gate.set()

    def save(self, step, fragments, *, rank_state, trainer, config, extra_files=None):
        assert self.gate.wait(20)
        if step in self.fails:
            raise self.error
        self.saved[step] = [fragment.tensor.clone() for fragment in fragments]
        return SaveReport(0.0, 1, self.path)


def snapshot(step, tensor):
    return Snapshot(step, fragments_of(tensor), Content(rank_state={}, trainer={}, config={}))


@pytest.fixture
def stores(tmp_path):
    return Recorder(tmp_path / "durable"), Recorder(tmp_path / "local")


def saver_of(stores, **kwargs):
    durable, local = stores
    return TieredSaver([Tier("durable", durable, **kwargs), Tier("local", local)])


def test_both_tiers_write_the_values_of_the_call(stores):
    saver, tensor = saver_of(stores), torch.zeros(1000)
    for step in (1, 2, 3):
        tensor.fill_(step)
        saver.save(snapshot(step, tensor), {"durable", "local"} if step != 2 else {"local"})
        tensor.fill_(-1)
    saver.close()
    durable, local = stores
    assert sorted(durable.saved) == [1, 3] and sorted(local.saved) == [1, 2, 3]
    for store in stores:
        for step, (values,) in store.saved.items():
            assert torch.equal(values, torch.full((1000,), float(step)))
    assert sorted((o.tier, o.step) for o in saver.outcomes() if isinstance(o, Outcome)) == [
        ("durable", 1), ("durable", 3), ("local", 1), ("local", 2), ("local", 3)
    ]  # fmt: skip
    assert saver.outcomes() == []


def test_a_slow_tier_holds_up_its_own_next_save_and_no_other(stores):
    durable, local = stores
    saver = saver_of(stores)
    durable.gate.clear()
    saver.save(snapshot(1, torch.ones(8)), {"durable", "local"})
    for step in (2, 3, 4):  # the second buffer goes round and round
        saver.save(snapshot(step, torch.ones(8)), {"local"})
    deadline = time.monotonic() + 10
    while len(local.saved) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(local.saved) == [1, 2, 3, 4] and not durable.saved

    waiting = threading.Thread(target=saver.save, args=(snapshot(5, torch.ones(8)), {"durable", "local"}))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "training cannot run further ahead than one checkpoint"
    durable.gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    saver.close()
    assert sorted(durable.saved) == [1, 5] and sorted(local.saved) == [1, 2, 3, 4, 5]


def test_a_failed_save_is_an_outcome_and_the_next_one_is_tried(stores):
    durable, _ = stores
    durable.fails = (1,)
    saver = saver_of(stores, after=lambda step, report: [f"after {step}"])
    for step in (1, 2):
        saver.save(snapshot(step, torch.ones(8)), {"durable"})
    saver.wait()
    failed, good, followed = saver.outcomes()
    assert failed.report is None and failed.error is durable.error
    assert good.report is not None and good.error is None
    assert followed == Followed(("after 2",), None)
    saver.close()


def test_what_follows_a_save_may_fail_without_undoing_it(stores):
    def after(step, report):
        raise CheckpointError("no room for the export")

    saver = saver_of(stores, after=after)
    saver.save(snapshot(1, torch.ones(8)), {"durable"})
    saver.wait()
    saved, followed = saver.outcomes()
    assert saved.report is not None and saved.error is None and "no room" in str(followed.error)
    saver.close()


def test_a_lost_rank_is_raised_where_someone_waits(stores):
    durable, _ = stores
    durable.fails, durable.error = (1,), RuntimeError("Connection closed by peer")
    saver = saver_of(stores)
    saver.save(snapshot(1, torch.ones(8)), {"durable"})
    with pytest.raises(RuntimeError, match="Connection closed"):
        saver.wait()
    saver.save(snapshot(2, torch.ones(8)), {"durable"})  # the buffer came back
    saver.close()
    assert sorted(durable.saved) == [2]


def test_ranks_meet_on_the_thread_of_the_store(tmp_path):
    """Three ranks, real stores: training of one may be far ahead of the others' when it saves."""

    def train(peers):
        saver = TieredSaver([Tier("durable", CheckpointStore(tmp_path, peers))])
        values = torch.empty(6)
        for step in (1, 2, 3):
            values.fill_(10 * step + peers.rank)
            part = fragments_of(values)[0]
            mine = type(part)("w", "weight", (18,), ((0, 18),), 6 * peers.rank, part.tensor)
            time.sleep(0.01 * peers.rank)
            saver.save(Snapshot(step, [mine], Content(rank_state={}, trainer={"step": step}, config={})), {"durable"})
        saver.close()
        return [(outcome.step, outcome.error) for outcome in saver.outcomes() if isinstance(outcome, Outcome)]

    assert on_ranks(3, train) == [[(1, None), (2, None), (3, None)]] * 3
    for step in (1, 2, 3):
        values = open_checkpoint(tmp_path / f"global_step{step}", peers=SingleProcess()).read("w")
        assert values.tolist() == [10.0 * step + rank for rank in range(3) for _ in range(6)]
