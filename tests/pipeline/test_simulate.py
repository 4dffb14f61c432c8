"""The clock: durations, latency, hand-overs that cost none, and the accounts of idle time and activations."""

import pytest

from megatron_ds.pipeline.schedule import SCHEDULES, Compute, V
from megatron_ds.pipeline.simulate import Durations, Span, simulate


def test_two_ranks_by_hand():
    result = simulate(SCHEDULES["1f1b"].tables(2, 2, 1), durations=Durations(1, 2, 3, latency=0.5))
    assert result.spans == [
        Span(0, Compute("forward", 0), 0, 1),
        Span(0, Compute("forward", 1), 1, 2),
        Span(0, Compute("backward", 0), 8, 13),
        Span(0, Compute("backward", 1), 14, 19),
        Span(1, Compute("forward", 0), 1.5, 2.5),
        Span(1, Compute("backward", 0), 2.5, 7.5),
        Span(1, Compute("forward", 1), 7.5, 8.5),
        Span(1, Compute("backward", 1), 8.5, 13.5),
    ]
    assert result.makespan == 19
    assert result.bubble == pytest.approx([7 / 19, 7 / 19]) and result.mean_bubble == pytest.approx(7 / 19)
    assert result.peak_activations == [2, 1]


def test_the_halves_of_a_backward_pass_take_their_own_times():
    spans = simulate(SCHEDULES["zb_h1"].tables(2, 1, 1), durations=Durations(1, 2, 4)).spans
    assert [(span.rank, span.compute.kind, span.start, span.end) for span in spans] == [
        (0, "forward", 0, 1),
        (0, "backward_input", 4, 6),
        (0, "backward_weight", 6, 10),
        (1, "forward", 1, 2),
        (1, "backward_input", 2, 4),
        (1, "backward_weight", 4, 8),
    ]


def test_an_activation_lives_until_its_weight_gradients_are_there():
    kinds = ["forward", "forward", "backward_input", "backward_input", "forward", "backward_weight"]
    numbers = [0, 1, 0, 1, 2, 0]
    table = [Compute(kind, number) for kind, number in zip(kinds, numbers)]
    assert simulate([table]).peak_activations == [3]


def test_handing_over_takes_no_time_but_sending_does():
    def makespan(ranks, latency):
        return simulate(SCHEDULES["zb_v"].tables(ranks, 1, 2), 2, V, Durations(latency=latency)).makespan

    assert makespan(1, 100) == makespan(1, 0) == 6
    # There and back, forward and backward, is four messages between two ranks.
    assert makespan(2, 100) == makespan(2, 0) + 4 * 100


def test_chunks_share_the_time_of_a_stage():
    assert Durations(4, 8, 12, latency=1).per_chunk(4) == Durations(1, 2, 3, latency=1)
