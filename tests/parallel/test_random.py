"""Seeds are functions of their identity alone."""

import torch

from megatron_ds.parallel.random import derive_seed, micro_batch_seed, seed_default_generator


def test_derived_seeds_are_fixed_and_distinct():
    assert derive_seed(1234, "norm.weight") == derive_seed(1234, "norm.weight")
    assert 0 <= derive_seed(1234, "norm.weight") < 2**63
    seeds = {derive_seed(*identity) for identity in [(1,), (2,), ("1",), (1, 2), (12,), (1, "2"), ("1", 2)]}
    assert len(seeds) == 7


def test_a_seed_is_the_same_in_every_version():
    """Resumed runs depend on it: a change here changes the dropout masks and initial weights of every run."""
    assert derive_seed(1234, "norm.weight") == 8284785831730052302


def test_micro_batches_differ():
    seeds = {micro_batch_seed(seed, step, index) for seed in (1, 2) for step in range(5) for index in range(5)}
    assert len(seeds) == 50


def test_seeding_the_default_generator():
    seed_default_generator(torch.device("cpu"), 7)
    first = torch.rand(3)
    torch.rand(100)
    seed_default_generator(torch.device("cpu"), 7)
    assert torch.equal(torch.rand(3), first)
