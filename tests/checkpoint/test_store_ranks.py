"""The store over real processes: the run's own groups are its peers."""

import torch
from ranks import run_ranks

from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
from megatron_ds.errors import CheckpointError


def save_fail_and_find(groups, directory):
    store = CheckpointStore(directory, groups)
    half = Fragment("w", "weight", (7,), ((0, 7),), 4 * groups.rank, torch.arange(7.0)[4 * groups.rank :][:4])
    state = {"torch": torch.tensor([groups.rank])}
    store.save(1, [half], rank_state=state, trainer={"step": 1}, config={})

    def disk_full():
        yield half
        if groups.rank == 1:
            raise OSError(28, "No space left on device")

    try:
        store.save(2, disk_full(), rank_state=state, trainer={"step": 2}, config={})
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    checkpoint = store.newest()
    return message, checkpoint.step, checkpoint.rank_state(groups.rank)["torch"].item()


def test_two_processes(tmp_path):
    results = run_ranks(save_fail_and_find, 2, tmp_path)
    message = f"saving {tmp_path}/global_step2 failed: [Errno 28] No space left on device (rank 1)"
    assert results == [(f"{message}; earlier checkpoints are untouched", 1, rank) for rank in range(2)]
    assert torch.equal(open_checkpoint(tmp_path).read("w"), torch.arange(7.0))
