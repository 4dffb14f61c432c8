"""Programs on channels without processes: what is sent is received, in order, and nobody waits forever.

The channels are as bad as they come: a send lasts until its receiver has posted the receive (rendezvous), and a rank's
messages of one direction, whoever they come from or go to, are handled one at a time in the order of its program.
"""

from collections import defaultdict

import pytest

from megatron_ds.pipeline.lowering import ScheduleError, Transfer, lower
from megatron_ds.pipeline.schedule import LOOP, SCHEDULES, Compute, V, forward_only
from megatron_ds.pipeline.simulate import simulate

INPUT = {"forward": "activation", "backward": "gradient", "backward_input": "gradient"}
"""What a pass needs from another stage."""
MICRO_BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 21, 32)
CHUNKS = {"1f1b": (1,), "interleaved": (2, 3, 4), "zb_h1": (1,), "zb_v": (2,)}


def cases(num_ranks):
    """(id, programs, chunks, placement) of every schedule and of evaluation, for many numbers of micro-batches."""
    for micro in MICRO_BATCHES:
        for name, schedule in SCHEDULES.items():
            for chunks in CHUNKS[name]:
                if schedule.problem(num_ranks, micro, chunks) is None:
                    programs = lower(schedule.tables(num_ranks, micro, chunks), chunks, schedule.placement)
                    yield f"{name} {micro} {chunks}", programs, chunks, schedule.placement
        for placement, chunks in ((LOOP, 1), (LOOP, 2), (LOOP, 3), (V, 2)):
            programs = lower(forward_only(num_ranks, micro, chunks, placement), chunks, placement)
            yield f"forward {placement.shape} {micro} {chunks}", programs, chunks, placement


def is_down(transfer, rank):
    """Whether a message of ``rank``'s program goes to a later rank."""
    sender, receiver = (rank, transfer.peer) if transfer.kind.startswith("send") else (transfer.peer, rank)
    return sender < receiver


def play(programs, num_chunks, placement):
    """Run the programs; returns the most receives that were posted and not used yet. Fails on a deadlock."""
    num_ranks = len(programs)
    at = [0] * num_ranks
    channels = [defaultdict(list) for _ in programs]  # rank -> direction -> messages posted and not exchanged
    arrived, posted = set(), [set() for _ in programs]
    most = 0

    def inputs_are_here(rank, compute):
        stage = placement.stage(rank, compute.chunk, num_ranks)
        what = INPUT.get(compute.kind)
        if (what == "activation" and stage > 0) or (what == "gradient" and stage < num_ranks * num_chunks - 1):
            place = rank, what, compute.chunk, compute.micro_batch
            if place not in arrived:
                return False
            arrived.remove(place)
            posted[rank].discard(place)
        return True

    def advance(rank):
        nonlocal most
        start = at[rank]
        for step in programs[rank][start:]:
            if isinstance(step, Compute):
                if not inputs_are_here(rank, step):
                    break
            else:
                verb, what = step.kind.split("_")
                if verb == "hand":
                    assert step.peer == rank
                    arrived.add((rank, what, step.peer_chunk, step.micro_batch))
                else:
                    ends = [(rank, step.chunk), (step.peer, step.peer_chunk)]
                    source, target = ends if verb == "send" else ends[::-1]
                    channels[rank][is_down(step, rank)].append((source, target, what, step.micro_batch))
                    if verb == "recv":
                        posted[rank].add((rank, what, step.chunk, step.micro_batch))
                        most = max(most, len(posted[rank]))
            at[rank] += 1
        return at[rank] > start

    def exchange(rank):
        """Let the first message of each direction through, if it is the first one at its other end too."""
        moved = False
        for direction, queue in channels[rank].items():
            if queue:
                (source, _), (target, chunk), what, number = queue[0]
                other = channels[target if source == rank else source][direction]
                if other[:1] == queue[:1]:
                    queue.pop(0), other.pop(0)
                    arrived.add((target, what, chunk, number))
                    moved = True
        return moved

    while any([advance(rank) for rank in range(num_ranks)] + [exchange(rank) for rank in range(num_ranks)]):
        pass
    assert at == [len(program) for program in programs], "deadlock"
    assert not any(queue for rank in channels for queue in rank.values()), "a message that nobody takes"
    assert not arrived, "a message that nobody uses"
    return most


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_nothing_deadlocks_and_few_receives_wait(num_ranks):
    for name, programs, chunks, placement in cases(num_ranks):
        most = play(programs, chunks, placement)
        assert most <= (5 if name.startswith("interleaved") else 3), name


def test_the_test_finds_a_deadlock():
    """Two ranks that each receive before they send, on a channel that cannot do both."""
    crossed = [
        [Transfer("recv_gradient", 0, 0, 1, 0), Compute("backward", 0), Transfer("send_activation", 0, 0, 1, 0)],
        [Transfer("recv_activation", 0, 0, 0, 0), Compute("forward", 0), Transfer("send_gradient", 0, 0, 0, 0)],
    ]
    with pytest.raises(AssertionError, match="deadlock"):
        play(crossed, 1, LOOP)


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
def test_messages_of_a_pair_are_in_one_order(num_ranks):
    for name, programs, _, _ in cases(num_ranks):
        for sender in range(num_ranks):
            for receiver in set(range(num_ranks)) - {sender}:
                sent = transfers(programs[sender], "send", receiver)
                received = transfers(programs[receiver], "recv", sender)
                assert [(k, n, here, there) for k, n, there, here in sent] == received, name


def transfers(program, verb, peer):
    """What, micro-batch, own chunk, peer's chunk of all messages with a peer."""
    return [
        (step.kind.split("_")[1], step.micro_batch, step.chunk, step.peer_chunk)
        for step in program
        if isinstance(step, Transfer) and step.kind.startswith(verb) and step.peer == peer
    ]


def test_a_message_travels_while_its_receiver_computes():
    """The middle of 1F1B: each input was posted one compute before the one that needs it."""
    program = lower(SCHEDULES["1f1b"].tables(4, 8, 1))[1]
    start = program.index(Compute("backward", 1))
    assert program[start - 1 : start + 8] == [
        Transfer("recv_activation", 4, 0, 0, 0),
        Compute("backward", 1),
        Transfer("send_gradient", 1, 0, 0, 0),
        Transfer("recv_gradient", 2, 0, 2, 0),
        Compute("forward", 4),
        Transfer("send_activation", 4, 0, 2, 0),
        Transfer("recv_activation", 5, 0, 0, 0),
        Compute("backward", 2),
        Transfer("send_gradient", 2, 0, 0, 0),
    ]


def test_what_stays_on_a_rank_is_handed_over():
    turn = lower(SCHEDULES["zb_v"].tables(2, 1, 2), 2, V)[1]
    assert turn == [
        Transfer("recv_activation", 0, 0, 0, 0),
        Compute("forward", 0, 0),
        Transfer("hand_activation", 0, 0, 1, 1),
        Compute("forward", 0, 1),
        Transfer("send_activation", 0, 1, 0, 1),
        Transfer("recv_gradient", 0, 1, 0, 1),
        Compute("backward_input", 0, 1),
        Transfer("hand_gradient", 0, 1, 1, 0),
        Compute("backward_weight", 0, 1),
        Compute("backward_input", 0, 0),
        Transfer("send_gradient", 0, 0, 0, 0),
        Compute("backward_weight", 0, 0),
    ]
    alone = lower(SCHEDULES["interleaved"].tables(1, 3, 2), 2)[0]
    assert {step.kind for step in alone if isinstance(step, Transfer)} == {"hand_activation", "hand_gradient"}


def test_impossible_tables_are_refused():
    backward_first = [[Compute("backward", 0), Compute("forward", 0)]]
    crossed = [[Compute("forward", 1), Compute("forward", 0)], [Compute("forward", 0)], [Compute("forward", 2)]]
    for broken in (backward_first, crossed):
        with pytest.raises(ScheduleError, match="deadlock"):
            lower(broken)
        with pytest.raises(ScheduleError, match="deadlock"):
            simulate(broken)
