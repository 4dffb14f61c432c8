"""The parts of the exchange benchmark that have to be right before its numbers mean anything."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import moe_exchange  # noqa: E402
import network  # noqa: E402
from moe_peers import Shape, make_problem, route  # noqa: E402
from payload_memory import PayloadMemory  # noqa: E402


def namespaces(pid: int) -> set[str]:
    """Those that a process made and did not remove."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return {name for name in listed if name.startswith(f"mds{pid}")}


TALK = """
import os, socket, sys

sys.path.insert(0, {benchmarks!r})
import network

first = os.environ["RANK"] == "0"
server = socket.create_server((os.environ["MASTER_ADDR"], 5000)) if first else None


def ready():
    pass


def talk(address, size):
    before = network.sent_bytes()
    if first:
        peer, _ = server.accept()
        size = sum(map(len, iter(lambda: peer.recv(65536), b"")))
        peer.close()
    else:
        with socket.create_connection((address, 5000)) as peer:
            peer.sendall(bytes(size))
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
    return size, network.sent_bytes() - before


def fail():
    assert first, "as the test wants it"


network.serve(dict(ready=ready, talk=talk, fail=fail))
"""


def test_network_or_the_reason_why_not(capsys, tmp_path):
    """With root and tc: traffic is counted, and an error leaves nothing behind. Without: SKIPPED, in words."""
    if reason := network.obstacle():
        assert moe_exchange.main([]) == 0
        assert capsys.readouterr().out == f"SKIPPED: {reason}\n"
        return
    script = tmp_path / "talk.py"
    script.write_text(TALK.format(benchmarks=str(BENCHMARKS)))
    allowed = network.CONGESTION_CONTROLS.read_text()
    with pytest.raises(RuntimeError, match="rank 1 ended"), network.Network(hosts=2) as made:
        made.shape(100)
        made.shape(0)
        assert namespaces(os.getpid()) > set(made.names)
        with network.Ranks(made, script) as ranks:
            ranks.call("ready")
            (received, replies), (sent, on_the_wire) = ranks.call("talk", made.address(0), 10**6)
            assert received == sent == 10**6
            assert sent <= on_the_wire <= 1.05 * sent and replies <= 0.05 * sent
            ranks.call("fail")
    assert not namespaces(os.getpid())
    assert network.CONGESTION_CONTROLS.read_text() == allowed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(number):
    """Also when it comes twice, as ``timeout`` sends it; where no network can be built there is none to leave."""
    if network.obstacle():
        return
    code = (
        "import network, time\nwith network.ended_by_signals(), network.Network(1): print(flush=True), time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=BENCHMARKS, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert namespaces(process.pid)
        process.send_signal(number)
        process.send_signal(number)
    assert process.returncode != 0
    assert not namespaces(process.pid)


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "expected"), [(8, 2, 4, 1.393), (16, 4, 4, 2.184), (64, 8, 8, 4.753), (8, 2, 8, 1.75)]
)
def test_rows_that_leave_a_rank(experts, top_k, ranks, expected):
    """The model against tokens that are counted one by one."""
    shape = Shape(tokens=4000, hidden=experts, ffn=8, experts=experts, top_k=top_k, skew=0.0)
    assert moe_exchange.rank_rows(shape, ranks) == pytest.approx(expected, abs=1e-3)
    problem = make_problem(shape, rank=0, ranks=ranks)
    _, expert_TK = route(problem, problem.router_ED, problem.x_TD)
    peers = [set(chosen) - {0} for chosen in (expert_TK // (experts // ranks)).tolist()]
    assert sum(map(len, peers)) / shape.tokens == pytest.approx(expected, rel=0.02)


def received(groups, seed):
    """Floats by a collective, bytes point to point, and a count; from tokens that depend on ``seed``."""
    generator = torch.Generator().manual_seed(seed + groups.rank)
    sent = torch.rand(2, 3, generator=generator)
    rows, message, count = torch.empty(2, 3), torch.empty(4, dtype=torch.uint8), torch.empty(2, dtype=torch.long)
    dist.all_to_all_single(rows, sent)
    dist.all_to_all_single(count, torch.full((2,), seed))
    peer = 1 - groups.rank
    outgoing = torch.randint(256, (4,), dtype=torch.uint8, generator=generator)
    operations = [dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, message, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return rows, message, count


def record_and_replay(groups):
    memory = PayloadMemory()
    with memory.recorded():
        recorded = received(groups, 0)
    with memory.replayed():
        replayed = received(groups, 10)
    return recorded, replayed


def test_replayed_payload_is_the_recorded_one():
    """Under ``replayed`` rows and messages come from memory, whatever is sent, and counts from the network."""
    for (rows, message, count), (rows_again, message_again, count_again) in run_ranks(record_and_replay, 2):
        assert torch.equal(rows, rows_again) and torch.equal(message, message_again)
        assert count.tolist() == [0, 0] and count_again.tolist() == [10, 10]
