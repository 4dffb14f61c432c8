"""Messages around a ring of ranks: an all-to-all as a rotation of direct peers, with work in between.

In step s every rank sends to the rank s places ahead and receives from the one s places behind, so a receiver has one
sender at a time and what it received can be worked on while the next step is on the wire. A round trip (``round_trip``)
is the form that experts need: a request goes out to every peer, is served there, and the reply comes back at once.

Process groups keep four streams of messages apart. Requests and replies are two, so that their order cannot mix; each
of them is split by direction, upwards and downwards in ring order, because gloo moves large messages over a connection
in one direction at a time. Every rank posts the steps in the same order, and the operations of a step once per process
group, which is what NCCL asks for. A message without bytes is not sent; both ends know the sizes beforehand.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

SMALL_MESSAGE = 64 * 1024
"""Bytes up to which latency counts more than order on the wire: such messages are posted all at once."""

STEPS_IN_FLIGHT = 2
"""Requests on the wire at a time. With one, the link rests whenever serving takes longer than sending, and the next
request shares it with the replies; with all, they share it among themselves and none is there early."""


@dataclass
class Traffic:
    """What went over rings, added up until ``reset``."""

    bytes_sent: int = 0
    """Payload that this rank sent to others."""
    bytes_between_nodes: int = 0
    """The part of it that left the node."""
    seconds: float = 0.0
    """From the first message of an exchange to its last, work in between included."""
    exposed_seconds: float = 0.0
    """The part of it in which this rank only waited (on CUDA: the host; streams wait without it)."""

    def reset(self) -> None:
        """Start again from zero."""
        self.__init__()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Count the time of the body as an exchange."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the body as exposed."""
        start = time.perf_counter()
        yield
        self.exposed_seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Lane:
    """One stream of messages: a process group per direction. Places in the ring are ranks of these groups."""

    up: dist.ProcessGroup
    """From lower to higher places in the ring."""
    down: dist.ProcessGroup


class Transfer:
    """A message that this rank sends and one that it receives, both on their way."""

    def __init__(self, works: list[dist.Work], sent: Tensor, received: Tensor, traffic: Traffic):
        self._works, self._sent, self._received, self._traffic = works, sent, received, traffic
        self.size = max(sent.nbytes, received.nbytes)

    def wait(self) -> Tensor:
        """Block until both have arrived; the received one."""
        with self._traffic.waiting():
            for work in self._works:
                work.wait()
        return self._received


class RoundTrip(Protocol):
    """What travels in ``Ring.round_trip``; peers are places in the ring, messages are contiguous uint8."""

    def request(self, peer: int) -> Tensor:
        """The message for ``peer``."""

    def request_buffer(self, peer: int) -> Tensor:
        """Room for the request of ``peer``."""

    def serve_own(self) -> None:
        """The work that this rank has for itself; it runs while the first requests travel."""

    def serve(self, peer: int, request: Tensor) -> Tensor:
        """Work on the request of ``peer``; the reply to it."""

    def reply_buffer(self, peer: int) -> Tensor:
        """Room for the reply of ``peer``."""

    def meanwhile(self) -> None:
        """Work that no peer waits for; it runs while the last replies travel."""

    def collect(self, peer: int, reply: Tensor) -> None:
        """Take the reply of ``peer``; called in the order of the steps, whatever arrives first."""


@dataclass(frozen=True)
class Ring:
    """One rank's place in a ring."""

    index: int
    """Place of this rank."""
    size: int
    group: dist.ProcessGroup
    """All ranks of the ring, for collectives, which never run while messages are on their way; also a lane's."""
    requests: Lane
    replies: Lane
    ranks_per_node: int
    """Neighbouring places that share a node; places of other nodes are counted in ``Traffic.bytes_between_nodes``."""
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def build(cls, rings: list[list[int]], rank: int) -> "Ring":
        """Create the process groups of disjoint rings of global ranks; collective over the world.

        Args:
            rings: the same list on every rank, each ring in ascending order.
            rank: this rank, a member of one of them.
        """
        mine = None
        for ranks in rings:
            assert ranks == sorted(ranks), f"a ring is in ascending order: {ranks}"
            # A group costs a thread that wakes up 100 times a second (gloo): no more of them than there are streams.
            streams = 4 if len(ranks) > 1 else 1
            groups = [dist.new_group(ranks) for _ in range(streams)]
            if rank in ranks:
                # NCCL wants all members in the first operation of a group, and later steps may involve only some.
                for group in groups:
                    dist.barrier(group)
                up, down, up_again, down_again = groups * (4 // streams)
                requests, replies = Lane(up, down), Lane(up_again, down_again)
                mine = cls(ranks.index(rank), len(ranks), up, requests, replies, len(ranks))
        assert mine is not None, f"rank {rank} is in none of the rings {rings}"
        return mine

    def counting(self, traffic: Traffic, ranks_per_node: int | None = None) -> "Ring":
        """The same ring, which counts into ``traffic``."""
        return replace(self, traffic=traffic, ranks_per_node=ranks_per_node or self.size)

    def ahead(self, step: int) -> int:
        """The place ``step`` places ahead of this rank (behind it, when negative)."""
        return (self.index + step) % self.size

    def post(self, step: int, outgoing: Tensor, incoming: Tensor, lane: Lane) -> Transfer:
        """Send ``outgoing`` ``step`` places ahead and receive ``incoming`` from as far behind, without waiting."""
        target, source = self.ahead(step), self.ahead(-step)
        up, down = [], []
        if outgoing.numel():
            group, batch = (lane.up, up) if target > self.index else (lane.down, down)
            batch.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=target))
            self._count(outgoing.nbytes, target)
        if incoming.numel():
            group, batch = (lane.up, up) if source < self.index else (lane.down, down)
            batch.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
        works = [work for batch in (up, down) if batch for work in dist.batch_isend_irecv(batch)]
        return Transfer(works, outgoing, incoming, self.traffic)

    def round_trip(self, trip: RoundTrip) -> None:
        """Requests to all peers, served as they come, and their replies.

        The own work runs while the first requests travel, the request of step s is served while later ones travel, and
        its reply leaves at once. Every peer gets a request and a reply, however short.
        """
        steps = range(1, self.size)
        posted: deque[Transfer] = deque()
        waiting = deque(steps)

        def post_requests() -> None:
            while waiting and (len(posted) < STEPS_IN_FLIGHT or sum(t.size for t in posted) <= SMALL_MESSAGE):
                step = waiting.popleft()
                request, buffer = trip.request(self.ahead(step)), trip.request_buffer(self.ahead(-step))
                posted.append(self.post(step, request, buffer, self.requests))

        post_requests()
        trip.serve_own()
        replies = []
        for step in steps:
            request = posted.popleft().wait()
            post_requests()
            reply = trip.serve(self.ahead(-step), request)
            replies.append(self.post(-step, reply, trip.reply_buffer(self.ahead(step)), self.replies))
        trip.meanwhile()
        for step, transfer in zip(steps, replies):
            trip.collect(self.ahead(step), transfer.wait())

    def exchange(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """All-to-all by rotation: ``outputs[p]`` becomes place p's ``inputs`` for this rank.

        Tensors are contiguous, of any dtype and of different sizes. Large messages go step by step, small ones all at
        once.
        """
        outputs[self.index].copy_(inputs[self.index])
        posted: list[Transfer] = []
        for step in range(1, self.size):
            outgoing, incoming = inputs[self.ahead(step)], outputs[self.ahead(-step)]
            posted.append(self.post(step, outgoing, incoming, self.requests))
            if posted[-1].size > SMALL_MESSAGE:
                posted.pop().wait()
        for transfer in posted:
            transfer.wait()

    def exchange_counts(self, count_PC: Tensor) -> Tensor:
        """int64 [P, C], row p for place p -> int64 [P, C], row p from place p: a small all-to-all collective."""
        return self.all_to_all(count_PC, [1] * self.size, [1] * self.size)

    def all_to_all(self, rows: Tensor, send_P: list[int], receive_P: list[int]) -> Tensor:
        """The library's collective: the first ``send_P[0]`` rows to place 0, the next to place 1, and so on."""
        if self.size == 1:
            return rows
        received = rows.new_empty((sum(receive_P), *rows.shape[1:]))
        with self.traffic.waiting():
            dist.all_to_all_single(received, rows.contiguous(), receive_P, send_P, group=self.group)
        row_bytes = rows.element_size() * (rows[0].numel() if len(rows) else 0)
        for place, count in enumerate(send_P):
            if place != self.index:
                self._count(count * row_bytes, place)
        return received

    def _count(self, size: int, place: int) -> None:
        self.traffic.bytes_sent += size
        if place // self.ranks_per_node != self.index // self.ranks_per_node:
            self.traffic.bytes_between_nodes += size
