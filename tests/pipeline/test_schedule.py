"""Order tables against torch's own generators and the papers' formulas, for every schedule and a grid of sizes."""

import sys
from itertools import product
from pathlib import Path

import pytest

from megatron_ds.pipeline.schedule import LOOP, SCHEDULES, V, forward_only
from megatron_ds.pipeline.simulate import Durations, simulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from schedule_references import BUBBLE, PEAK, torch_tables

HALVES = ("backward_input", "backward_weight")
CHUNKS = {"1f1b": (1,), "interleaved": (2, 3, 4), "zb_h1": (1,), "zb_v": (2,)}
EVERY = pytest.mark.parametrize(("name", "num_ranks"), [(name, p) for name in CHUNKS for p in (1, 2, 3, 4, 7, 8)])


def sizes(name, num_ranks, micro_batches=(1, 2, 3, 4, 7, 8, 12, 16, 21, 32)):
    """(ranks, micro-batches, chunks) that the schedule takes."""
    for micro in micro_batches:
        for chunks in CHUNKS[name]:
            if SCHEDULES[name].problem(num_ranks, micro, chunks) is None:
                yield num_ranks, micro, chunks


def run(name, num_ranks, micro, chunks):
    """Simulation with a whole stage's passes of one unit each."""
    schedule = SCHEDULES[name]
    tables = schedule.tables(num_ranks, micro, chunks)
    return simulate(tables, chunks, schedule.placement, Durations().per_chunk(chunks))


def test_every_schedule_is_tested():
    assert SCHEDULES.keys() == CHUNKS.keys()


@pytest.mark.parametrize("placement", [LOOP, V])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_a_placement_is_one_to_one(placement, num_ranks):
    places = [(rank, chunk) for rank in range(num_ranks) for chunk in range(2)]
    stages = [placement.stage(*place, num_ranks) for place in places]
    assert sorted(stages) == list(range(2 * num_ranks))
    assert [placement.rank_and_chunk(stage, num_ranks) for stage in stages] == places


def test_where_the_stages_are():
    assert [LOOP.stage(1, chunk, 4) for chunk in range(3)] == [1, 5, 9]
    assert [V.stage(rank, 0, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [V.stage(rank, 1, 4) for rank in range(4)] == [7, 6, 5, 4]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_order_is_torchs(name, num_ranks):
    for size in sizes(name, num_ranks, [factor * num_ranks for factor in (1, 2, 4, 5)]):
        assert SCHEDULES[name].tables(*size) == torch_tables(name, *size)


@EVERY
def test_every_pass_happens_once_and_in_the_order_of_the_micro_batches(name, num_ranks):
    kinds = {"forward", *(HALVES if name.startswith("zb") else ["backward"])}
    for size in sizes(name, num_ranks):
        _, micro, chunks = size
        for table in SCHEDULES[name].tables(*size):
            assert {compute.chunk for compute in table} == set(range(chunks))
            for chunk in range(chunks):
                numbers = {}
                for compute in table:
                    if compute.chunk == chunk:
                        numbers.setdefault(compute.kind, []).append(compute.micro_batch)
                assert numbers == {kind: list(range(micro)) for kind in kinds}


@EVERY
def test_makespan_and_activations_are_those_of_the_formulas(name, num_ranks):
    for size in sizes(name, num_ranks):
        micro = size[1]
        result = run(name, *size)
        bubble = BUBBLE[name](*size)
        assert result.makespan == pytest.approx(float(3 * micro + bubble), abs=1e-9)
        assert result.mean_bubble == pytest.approx(float(bubble / (3 * micro + bubble)))
        assert max(result.peak_activations) == pytest.approx(float(PEAK[name](*size)))


def test_later_ranks_hold_less_unless_the_bubble_is_filled():
    assert run("1f1b", 4, 8, 1).peak_activations == [4, 3, 2, 1]
    assert run("interleaved", 4, 8, 2).peak_activations == [5.5, 4.5, 3.5, 2.5]
    assert run("zb_h1", 4, 8, 1).peak_activations == [4, 4, 4, 4]
    assert run("zb_v", 4, 8, 2).peak_activations == [4, 4, 4, 4]


@pytest.mark.parametrize(("placement", "chunks"), [(LOOP, 1), (LOOP, 2), (LOOP, 3), (V, 2)])
def test_forward_only_takes_any_number_of_micro_batches(placement, chunks):
    for num_ranks, micro in product((1, 2, 3, 4, 8), (1, 2, 3, 5, 8, 17)):
        tables = forward_only(num_ranks, micro, chunks, placement)
        everything = sorted((number, chunk) for number in range(micro) for chunk in range(chunks))
        for table in tables:
            assert sorted((c.micro_batch, c.chunk) for c in table) == everything
            assert {c.kind for c in table} == {"forward"}
        # No micro-batch waits on its way: the makespan is the last one's start and its way through all stages.
        groups, rest = divmod(micro - 1, num_ranks)
        start = chunks * (micro - 1) if placement is V else groups * num_ranks * chunks + rest
        assert simulate(tables, chunks, placement).makespan == start + num_ranks * chunks


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("1f1b", (4, 8, 2), "it needs 1 chunk per rank, not 2"),
        ("zb_h1", (4, 8, 3), "it needs 1 chunk per rank, not 3"),
        ("zb_v", (4, 8, 1), "it needs 2 chunks per rank, not 1"),
        ("interleaved", (4, 8, 1), "it needs 2 or more chunks per rank, not 1"),
        ("interleaved", (4, 6, 2), "its micro-batches must be a multiple of the 4 ranks, not 6; use 4 or 8"),
        ("interleaved", (4, 3, 2), "its micro-batches must be a multiple of the 4 ranks, not 3; use 4"),
    ],
)
def test_impossible_sizes_are_refused(name, sizes, message):
    assert SCHEDULES[name].problem(*sizes) == message
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name].tables(*sizes)
