"""Order tables against torch's own generators and the papers' formulas, for every schedule and a grid of sizes."""

import types
from itertools import combinations, pairwise

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_ds.pipeline.lowering import ScheduleError, Transfer, lower
from megatron_ds.pipeline.partition import partition
from megatron_ds.pipeline.schedule import SCHEDULES, Compute, forward_only, one_forward_one_backward, tables
from megatron_ds.pipeline.simulate import simulate

SIZES = [(ranks, micro) for ranks in (1, 2, 3, 4, 8) for micro in (1, 2, 3, 4, 7, 8, 16, 33)]


def torch_1f1b(num_ranks, num_micro_batches):
    """Torch's own 1F1B order of every rank, without its idle slots and gradient reductions."""
    schedule = types.SimpleNamespace(_num_stages=num_ranks, _n_microbatches=num_micro_batches)
    order = torch_schedules.Schedule1F1B._get_pipeline_order(schedule)
    names = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}
    return [
        [
            (names[a.computation_type.name], a.microbatch_index)
            for a in order[rank]
            if a and a.computation_type.name in names
        ]
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(("num_ranks", "micro"), [(p, m) for p in (2, 4, 8) for m in (p, 2 * p, 4 * p, 4 * p + 3)])
def test_1f1b_order_equals_torch(num_ranks, micro):
    ours = [[(c.kind, c.micro_batch) for c in t] for t in tables(one_forward_one_backward, num_ranks, micro)]
    theirs = torch_1f1b(num_ranks, micro)
    # torch numbers the forwards of its last rank from 1 (it has no warm-up to count from); ours start at 0 everywhere.
    theirs[-1] = [(kind, index - (kind == "forward")) for kind, index in theirs[-1]]
    assert ours == theirs


@pytest.mark.parametrize(("num_ranks", "micro"), SIZES)
def test_1f1b_meets_the_formulas(num_ranks, micro):
    result = simulate(tables(one_forward_one_backward, num_ranks, micro), forward=1, backward=2)
    assert result.makespan == 3 * (micro + num_ranks - 1)
    assert result.bubble == pytest.approx([(num_ranks - 1) / (micro + num_ranks - 1)] * num_ranks)
    assert result.peak_activations == [min(num_ranks - rank, micro) for rank in range(num_ranks)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "micro"), SIZES)
def test_every_pass_happens_once_and_transfers_pair_up(name, num_ranks, micro):
    order = tables(SCHEDULES[name], num_ranks, micro)
    for table in order:
        assert sorted((c.kind, c.micro_batch, c.chunk) for c in table) == sorted(
            (kind, m, 0) for kind in ("forward", "backward") for m in range(micro)
        )
    programs = lower(order)
    for sender, receiver in [(a, b) for a in range(num_ranks) for b in range(num_ranks) if a != b]:
        for what in ("activation", "gradient"):
            sent = [i.micro_batch for i in transfers(programs[sender], f"send_{what}", receiver)]
            received = [i.micro_batch for i in transfers(programs[receiver], f"recv_{what}", sender)]
            assert sent == received
            assert len(sent) == (micro if receiver - sender == (1 if what == "activation" else -1) else 0)


def transfers(program, kind, peer):
    return [i for i in program if isinstance(i, Transfer) and i.kind == kind and i.peer == peer]


@pytest.mark.parametrize(("num_ranks", "micro"), SIZES)
def test_programs_run_on_fifo_channels_without_deadlock(num_ranks, micro):
    """Blocking receives, buffered sends, one queue per direction of each pair: every program must reach its end."""
    for schedule in [*SCHEDULES.values(), forward_only]:
        programs = lower(tables(schedule, num_ranks, micro))
        queues, at = {}, [0] * num_ranks
        while any(at[r] < len(programs[r]) for r in range(num_ranks)):
            before = list(at)
            for rank, program in enumerate(programs):
                while at[rank] < len(program):
                    step = program[at[rank]]
                    if isinstance(step, Transfer):
                        what = step.kind.split("_")[1]
                        if step.kind.startswith("send"):
                            queues.setdefault((rank, step.peer, what), []).append(step.micro_batch)
                        else:
                            queue = queues.get((step.peer, rank, what), [])
                            if not queue:
                                break
                            assert queue.pop(0) == step.micro_batch
                    at[rank] += 1
            assert at != before, "deadlock"
        assert not any(queues.values())


def test_impossible_tables_are_refused():
    backward_first = [[Compute("backward", 0), Compute("forward", 0)]]
    crossed = [[Compute("forward", 1), Compute("forward", 0)], [Compute("forward", 0)], [Compute("forward", 2)]]
    for broken in (backward_first, crossed):
        with pytest.raises(ScheduleError, match="deadlock"):
            lower(broken)
        with pytest.raises(ScheduleError, match="deadlock"):
            simulate(broken)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_partition_is_contiguous_and_optimal(num_stages):
    costs = [3.0, 1.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    bounds = partition(costs, num_stages)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == num_stages + 1
    assert all(a < b for a, b in pairwise(bounds))

    def worst(cuts):
        return max(sum(costs[a:b]) for a, b in pairwise(cuts))

    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_stages - 1)]
    assert worst(bounds) == min(map(worst, every))


def test_equal_layers_are_shared_evenly():
    assert partition([1.0] * 8, 4) == [0, 2, 4, 6, 8]
