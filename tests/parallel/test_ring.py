"""The rotation against the library's collective, and round trips whose ranks are not equally fast."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_ds.parallel.ring import SMALL_MESSAGE, Ring, Traffic


def one_ring(groups):
    return Ring.build([list(range(groups.world_size))], groups.rank)


def uneven(rank, size, dtype):
    """One tensor for each peer, by sender and receiver: some without elements, some above the size of a small one."""
    generator = torch.Generator().manual_seed(rank)
    lengths = [(0, 3, 1, SMALL_MESSAGE + 5)[(3 * rank + peer) % 4] for peer in range(size)]
    return [torch.randint(-100, 100, (length,), generator=generator).to(dtype) for length in lengths]


def exchange(groups):
    ring, rank, size = one_ring(groups), groups.rank, groups.world_size
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        inputs = uneven(rank, size, dtype)
        outputs = [torch.empty_like(uneven(peer, size, dtype)[rank]) for peer in range(size)]
        before = ring.traffic.bytes_sent
        ring.exchange(inputs, outputs)
        expected = torch.empty(sum(map(len, outputs)), dtype=dtype)
        lengths = [list(map(len, tensors)) for tensors in (outputs, inputs)]
        dist.all_to_all_single(expected, torch.cat(inputs), *lengths)
        assert torch.equal(torch.cat(outputs), expected)
        assert ring.traffic.bytes_sent - before == sum(t.nbytes for peer, t in enumerate(inputs) if peer != rank)
        assert torch.equal(ring.all_to_all(torch.cat(inputs), *reversed(lengths)), expected)


def counts(groups):
    ring, rank, size = one_ring(groups), groups.rank, groups.world_size
    count_PC = torch.arange(3) + 10 * torch.arange(size)[:, None] + 1000 * rank
    return ring.exchange_counts(count_PC).tolist(), ring.traffic.bytes_sent


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_exchange_equals_the_collective(size):
    run_ranks(exchange, size)


@pytest.mark.parametrize("size", [2, 3])
def test_counts_reach_their_peers(size):
    for rank, (received, sent) in enumerate(run_ranks(counts, size)):
        assert received == [[1000 * peer + 10 * rank + c for c in range(3)] for peer in range(size)]
        assert sent == (size - 1) * 3 * 8


class Echo:
    """Every request names its sender and its receiver, every reply both and a length of its own."""

    def __init__(self, ring, length, sleep):
        self.ring, self.length, self.sleep, self.events = ring, length, sleep, []

    def message(self, sender, receiver):
        length = (0, self.length, 2)[(sender + receiver) % 3]
        return torch.full((length,), 16 * sender + receiver, dtype=torch.uint8)

    def request(self, peer):
        self.events.append(f"request {peer}")
        return self.message(self.ring.index, peer)

    def request_buffer(self, peer):
        return torch.empty_like(self.message(peer, self.ring.index))

    def serve_own(self):
        self.events.append("own")
        time.sleep(self.sleep)

    def serve(self, peer, request):
        self.events.append(f"serve {peer}")
        assert torch.equal(request, self.message(peer, self.ring.index))
        time.sleep(self.sleep)
        return torch.cat((request, request))

    def reply_buffer(self, peer):
        return torch.empty_like(self.message(self.ring.index, peer)).repeat(2)

    def meanwhile(self):
        self.events.append("meanwhile")

    def collect(self, peer, reply):
        assert torch.equal(reply, self.message(self.ring.index, peer).repeat(2))
        self.events.append(f"collect {peer}")


def round_trips(groups, length, slow):
    ring = one_ring(groups)
    trips = [Echo(ring, length, 0.1 * (groups.rank == slow)) for _ in range(3)]
    for trip in trips:
        ring.round_trip(trip)
    return [trip.events for trip in trips]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [7, SMALL_MESSAGE + 1])
def test_round_trips_go_step_by_step_also_when_a_rank_is_slow(size, length):
    for rank, trips in enumerate(run_ranks(round_trips, size, length, 1)):
        ahead = [(rank + step) % size for step in range(1, size)]
        behind = [(rank - step) % size for step in range(1, size)]
        for events in trips:
            assert [e for e in events if e.startswith("request")] == [f"request {peer}" for peer in ahead]
            rest = [e for e in events if not e.startswith("request")]
            assert rest == ["own", *(f"serve {p}" for p in behind), "meanwhile", *(f"collect {p}" for p in ahead)]
            assert events.index(f"request {ahead[0]}") < events.index("own")


def requests_in_flight(groups, length):
    trip = Echo(one_ring(groups), length, 0.0)
    trip.message = lambda sender, receiver: torch.full((length,), 16 * sender + receiver, dtype=torch.uint8)
    trip.ring.round_trip(trip)
    return trip.events.index("own")


def test_small_requests_leave_all_at_once_and_large_ones_in_turn():
    assert run_ranks(requests_in_flight, 8, 100) == [7] * 8
    assert run_ranks(requests_in_flight, 8, SMALL_MESSAGE) == [2] * 8


def disjoint(groups):
    rank = groups.rank
    pairs, alone = Ring.build([[0, 2], [1, 3]], rank), Ring.build([[0], [1], [2], [3]], rank)
    traffic = Traffic()
    ring = pairs.counting(traffic, ranks_per_node=1)
    outputs = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    ring.exchange([torch.tensor([rank, peer]) for peer in range(2)], outputs)
    own = torch.zeros(2)
    alone.exchange([torch.ones(2)], [own])
    trip = Echo(alone, 5, 0.0)
    alone.round_trip(trip)
    counted = (traffic.bytes_sent, traffic.bytes_between_nodes, pairs.traffic.bytes_sent, alone.traffic.bytes_sent)
    return torch.stack(outputs).tolist(), own.tolist(), trip.events, counted, alone.exchange_counts(own[None]).tolist()


def test_disjoint_rings_and_rings_of_one():
    for rank, (pairs, own, events, counted, counts) in enumerate(run_ranks(disjoint, 4)):
        assert pairs == [[peer, rank // 2] for peer in (rank % 2, rank % 2 + 2)]
        assert (own, counts, events) == ([1.0, 1.0], [[1.0, 1.0]], ["own", "meanwhile"])
        assert counted == (16, 16, 0, 0)


def test_traffic_starts_again_from_zero():
    traffic = Traffic(5, 4, 3.0, 2.0)
    traffic.reset()
    assert traffic == Traffic()
    with traffic.exchange(), traffic.waiting():
        time.sleep(0.01)
    assert 0.01 <= traffic.exposed_seconds <= traffic.seconds < 1
