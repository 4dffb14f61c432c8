"""What our pipeline schedules are held against: the formulas of the papers, and the orders of torch's own schedules.

The formulas are for passes of one unit: forward F = 1, backward of the inputs I = 1 and of the weights W = 1 through a
rank's whole stage (B = I + W), and no latency. Torch makes its orders from stages; mock ones will do, so no process
group is needed.
"""

from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace

from torch.distributed.pipelining import schedules as torch_schedules

from megatron_ds.pipeline.schedule import SCHEDULES, Compute, Table

BUBBLE: dict[str, Callable[[int, int, int], Fraction | int]] = {
    "1f1b": lambda p, m, v: 3 * (p - 1),
    "interleaved": lambda p, m, v: Fraction(3 * (p - 1), v),
    "zb_h1": lambda p, m, v: max(p - 1, 2 * p - 1 - m),
    "zb_v": lambda p, m, v: max(Fraction(p - 1, 2), 2 * p - 1 - m),
}
"""Idle time of a rank for p ranks, m micro-batches, v chunks; the makespan is 3 m more. With few micro-batches the
zero-bubble ones have too little to fill the way of the first one, 2 (p - 1) long, with: the m - 1 others."""
PEAK: dict[str, Callable[[int, int, int], Fraction | int]] = {
    "1f1b": lambda p, m, v: min(p, m),
    "interleaved": lambda p, m, v: min(p + Fraction(p - 1, v), m),
    "zb_h1": lambda p, m, v: min(p, m),
    "zb_v": lambda p, m, v: min(p, m),
}
"""Most activations on any rank, in those of a whole stage; they are alive until their weight gradient is done."""

_TORCH = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zb_h1": torch_schedules.ScheduleInterleavedZeroBubble,
    "zb_v": torch_schedules.ScheduleZBVZeroBubble,
}
_KINDS = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "backward_input",
    "BACKWARD_WEIGHT": "backward_weight",
}


def torch_tables(name: str, num_ranks: int, num_micro_batches: int, num_chunks: int) -> list[Table]:
    """Torch's order of every rank, without its idle slots and reductions."""
    placement = SCHEDULES[name].placement
    if name == "1f1b":
        sizes = SimpleNamespace(_num_stages=num_ranks, _n_microbatches=num_micro_batches)
        orders = torch_schedules.Schedule1F1B._get_pipeline_order(sizes)
        # Torch numbers the forwards of its last rank from 1, having no warm-up there to count from.
        shift = {num_ranks - 1: -1}
    else:
        stages = [placement.stage(0, chunk, num_ranks) for chunk in range(num_chunks)]
        mocks = [_mock_stage(stage, num_ranks, num_ranks * num_chunks) for stage in stages]
        orders, shift = _TORCH[name](mocks, num_micro_batches, loss_fn=lambda output, target: output).pipeline_order, {}

    def ours(action, rank: int) -> Compute:
        kind = _KINDS[action.computation_type.name]
        number = action.microbatch_index + (shift.get(rank, 0) if kind == "forward" else 0)
        return Compute(kind, number, placement.rank_and_chunk(action.stage_index, num_ranks)[1])

    return [
        [ours(action, rank) for action in orders[rank] if action and action.computation_type.name in _KINDS]
        for rank in range(num_ranks)
    ]


def _mock_stage(stage: int, num_ranks: int, num_stages: int) -> SimpleNamespace:
    """As much of a stage of rank 0 as a schedule looks at."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=num_stages,
        group_rank=0,
        group_size=num_ranks,
        group=None,
        is_first=stage == 0,
        is_last=stage == num_stages - 1,
        has_backward=True,
        submod=None,
        stage_index_to_group_rank=None,
        device="cpu",
    )
