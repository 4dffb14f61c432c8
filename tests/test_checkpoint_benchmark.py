"""The checkpoint benchmark runs: everybody saves and loads a small state, and every measure is there."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import checkpoint_parts  # noqa: E402
import checkpoint_reshard  # noqa: E402
import harness  # noqa: E402
from checkpoint_work import DEEPSPEED, KEPT, OURS, PLAIN, TORCH  # noqa: E402


def test_stalls_and_throughput(tmp_path):
    """One round of one step: times and speeds are positive, checkpoints equally large, and nothing is left."""
    report = harness.Report("")
    checkpoint_parts.compare(report, tmp_path, rounds=1, mib=16, steps=1)
    medians = {measure.name: measure.median for measure in report.measures}
    for kind in ("waiting", "computing"):
        assert all(medians[f"A {kind} steps, {name}: stall"] > 0 for name in (OURS, PLAIN, KEPT))
        assert medians[f"A {kind} steps, {PLAIN}: steps slower by"] > -50
    for action in ("save", "load, cold", "load, cached"):
        assert all(medians[f"B {action}: {name}"] > 0 for name in (OURS, TORCH, DEEPSPEED))
    sizes = [medians[f"B {name}: checkpoint"] for name in (OURS, TORCH, DEEPSPEED)]
    assert min(sizes) >= 32 and max(sizes) < 32.2, "two ranks with 16 MiB each"
    goals = sorted(measure.at_most for measure in report.measures if measure.goal)
    assert goals == 2 * [checkpoint_parts.STALL_AT_MOST] + 2 * [checkpoint_parts.PERCENT_AT_MOST]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_layouts_that_read(tmp_path, capsys, monkeypatch):
    """What is needed is read, once for all that share a memory; a directory that is no disk is named."""
    monkeypatch.setattr(checkpoint_reshard, "READ_BY", ((2, 3), (1, 2)))
    report = harness.Report("")
    checkpoint_reshard.compare_layouts(report, tmp_path, scale=8)
    if not report.measures:
        assert capsys.readouterr().out == f"SKIPPED part C: {tmp_path} is not on a disk\n"
        return
    ratios = [measure.median for measure in report.measures]
    assert len(ratios) == 3 and min(ratios) > 0.99, "tensor ranks also alone"


def test_parts_of_a_layout_tile_the_tensors():
    shapes = checkpoint_reshard.tensors(8, 16, 32)
    for layout in checkpoint_reshard.READ_BY:
        ranks = list(checkpoint_reshard.parts(layout, shapes))
        assert len(ranks) == layout[0] * layout[1]
        cut = sum(piece.length for pieces in ranks for piece in pieces if piece.name == "ffn_down")
        everywhere = sum(piece.length for pieces in ranks for piece in pieces if piece.name == "ffn_norm")
        assert cut == 3 * 8 * 16 and everywhere == 3 * 8 * layout[0]
