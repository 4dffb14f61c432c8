"""Which samples each rank of a grid reads: those of its data index, whatever its place in pipeline and tensor group."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ds.config.resolve import resolve
from megatron_ds.config.schema import RunConfig
from megatron_ds.data.loader import Datasets
from megatron_ds.data.samples import Sample, Span
from megatron_ds.parallel.topology import Topology
from megatron_ds.train.build import train_loader

SEQ = 8


class Numbered:
    """Sample k has the token k throughout; what is read is written down."""

    num_samples, seq_length, uncounted_input_id = None, SEQ, None

    def __init__(self):
        self.read = set()

    def __getitem__(self, k):
        self.read.add(k)
        return Sample(np.full(SEQ + 1, k), np.zeros(SEQ + 1, int), (Span(0, 0, SEQ + 1),), "numbers")


def configuration(topology):
    axes = {"tensor_model_parallel_size": topology.tensor, "pipeline_model_parallel_size": topology.pipe}
    tree = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "megatron_ds": {"generation": "v3", "model": {"seq_length": SEQ}, "parallel": axes},
    }
    return resolve(RunConfig.model_validate(tree), topology.world_size)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tensor=4),
        Topology(data=2, tensor=2),
        Topology(pipe=2, data=2, tensor=2),
        Topology(pipe=2, data=4, expert=2),
    ],
    ids=Topology.describe,
)
def test_peers_read_the_same_and_nobody_another_data_ranks_samples(topology):
    config, tokens, read = configuration(topology), {}, {}
    for rank in range(topology.world_size):
        groups = SimpleNamespace(topology=topology, index=lambda axis, rank=rank: topology.coordinate(rank, axis))
        numbered = Numbered()
        loader = train_loader(config, groups, Datasets(numbered, {}, None))
        batches = loader.global_batch(48, config.gradient_accumulation_steps)
        loader.close()
        index = topology.coordinate(rank, "data")
        here = [row[0] for batch in batches for row in batch.token_BS.tolist()]
        assert tokens.setdefault(index, here) == here
        read.setdefault(index, set()).update(numbered.read)
    assert sorted(number for here in tokens.values() for number in here) == list(range(48, 72)), (
        "together they read the global batch"
    )
    assert sum(map(len, read.values())) == len(set.union(*read.values())), "what is read ahead is their own, too"
