"""Runs that are killed at random moments, lose a node, or fill the disk: they end as if nothing had happened.

A life of a run is one launch. Its ranks die by kill -9, saves included; the launcher notices and ends. The next life
finds the newest whole checkpoint of any tier, and the ledger of all lives together equals that of a run that was left
in peace, bit for bit.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from ranks import free_port
from runs import launch, launch_command, ledger, losses, make_corpus

from megatron_ds.checkpoint.store import open_checkpoint

pytestmark = pytest.mark.launch

INTERVAL = 10
QUICK = (
    "--eval-interval", "none", "--lr-warmup-iters", "10", "--keep-last", "2",
    "--num-layers", "2", "--hidden-size", "32", "--seq-length", "32", "--log-interval", "100",
)  # fmt: skip
OFTEN = ("--save-interval", str(INTERVAL))
LOCAL = ("--local-save", "local", "--local-save-interval", "2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("survival"))


def rows(corpus, run):
    """Rows of a ledger that may be growing, or not exist yet."""
    path = corpus / "runs" / run / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(corpus, run):
    return max((row["step"] for row in rows(corpus, run) if row["kind"] == "step"), default=0)


def ranks_of(process):
    """The processes of the ranks, in order."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        environment = child.environ()
        if "RANK" in environment and "pretrain.py" in " ".join(child.cmdline()[:3]):
            found.setdefault(int(environment["RANK"]), child)
    return [found[rank] for rank in sorted(found)]


class Life:
    """One launch, until it is killed or ends by itself."""

    def __init__(self, corpus, run, *arguments, ranks=2, launcher="torchrun"):
        self.corpus, self.run = corpus, run
        self.lives_before = sum(row["kind"] == "start" for row in rows(corpus, run))
        self.output = (corpus / f"{run}.out").open("w+")
        self.process = subprocess.Popen(
            launch_command(launcher, ranks, "--run-name", run, *arguments),
            cwd=corpus, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until(self, condition):
        """Poll until something holds; False when the run has ended before."""
        deadline = time.monotonic() + 120
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)
        return True

    def trains(self):
        """Wait until it has taken a step of its own."""

        def took_a_step():
            kinds = [row["kind"] for row in rows(self.corpus, self.run)]
            starts = [index for index, kind in enumerate(kinds) if kind == "start"]
            return len(starts) > self.lives_before and "step" in kinds[starts[-1] :]

        return self.wait_until(took_a_step)

    def kill(self, which):
        """kill -9 some of the ranks, and wait for the launcher to notice."""
        try:
            for child in which(ranks_of(self.process)):
                child.kill()
        except psutil.NoSuchProcess:
            pass  # the run ended at this very moment
        self.process.wait(60)
        for child in psutil.Process().children(recursive=True):
            assert "pretrain.py" not in " ".join(child.cmdline()), "the launcher left a rank behind"

    def text(self):
        self.output.flush()
        return (self.corpus / f"{self.run}.out").read_text()


def resumed_at(corpus, run):
    return [row["step"] for row in rows(corpus, run) if row["kind"] == "start"][-1]


def kill_at_random(corpus, run, kills, steps, most_lost, *arguments, seed=0):
    """Kill a random rank at a random moment, again and again; compare with the same run left in peace."""
    chance = random.Random(seed)
    arguments = (*QUICK, *OFTEN, "--train-iters", str(steps), *arguments)
    reached, lost = 0, []
    for _ in range(kills):
        life = Life(corpus, run, *arguments)
        assert life.trains(), f"the run ended before it was killed {kills} times:\n{life.text()[-3000:]}"
        began = resumed_at(corpus, run)
        lost.append(reached - began)
        time.sleep(chance.uniform(0, 1.0))
        life.kill(lambda ranks: [chance.choice(ranks)])
        reached = last_step(corpus, run)
    launch(corpus, "torchrun", 2, "--run-name", run, *arguments)
    lost.append(reached - resumed_at(corpus, run))
    assert max(lost) <= most_lost, lost
    assert all(row.get("health/replay_ok", True) for row in ledger(corpus, run))
    launch(corpus, "torchrun", 2, "--run-name", f"{run}_in_peace", *arguments)
    assert losses(corpus, run) == losses(corpus, f"{run}_in_peace")
    print(f"{kills} kills; steps lost: {lost}")


def test_five_kills(corpus):
    """With a local tier, no more than the interval is lost; what one tier has not finished, the other has."""
    kill_at_random(corpus, "killed", 5, 150, INTERVAL, *LOCAL)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "arguments", "most_lost"),
    [
        ("local", LOCAL, INTERVAL),
        ("waiting", ("--no-async-save",), INTERVAL),
        ("background", (), 2 * INTERVAL),  # the interval, and what is trained while a save is being written
    ],
)
def test_fifty_kills(corpus, name, arguments, most_lost):
    kill_at_random(corpus, name, 50, 1500, most_lost, *arguments, seed=50)


def node(corpus, run, index, port, *arguments):
    """One of two emulated nodes with a rank each: a launcher of its own, as on a cluster."""
    command = launch_command("torchrun", 1, "--run-name", run, *arguments)
    script = command.index(next(word for word in command if word.endswith("pretrain.py")))
    place = ["--nnodes", "2", "--node-rank", str(index), "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    output = (corpus / f"{run}.node{index}.out").open("w")
    return subprocess.Popen(
        [command[0], *place, "--master-port", str(port), *command[script:]],
        cwd=corpus, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_a_lost_node_comes_back_from_its_neighbour(corpus):
    """All processes of one node die and its disk is gone; nothing durable was ever written."""
    arguments = (*QUICK, *LOCAL, "--local-save-neighbour", "--save-interval", "1000", "--train-iters", "40")
    run, port = "lost", free_port()
    nodes = [node(corpus, run, index, port, *arguments) for index in (0, 1)]
    deadline = time.monotonic() + 120
    while last_step(corpus, run) < 15:
        assert time.monotonic() < deadline and nodes[0].poll() is None, (corpus / f"{run}.node0.out").read_text()
        time.sleep(0.005)
    for child in [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]:
        child.kill()
    nodes[0].wait(60)
    nodes[1].wait()
    shutil.rmtree(corpus / "local" / run / "node1")
    assert not list((corpus / "runs" / run / "checkpoints").glob("global_step*"))

    reached, port = last_step(corpus, run), free_port()
    for process in [node(corpus, run, index, port, *arguments) for index in (0, 1)]:
        assert process.wait(120) == 0, (corpus / f"{run}.node0.out").read_text()
    assert 0 < reached - resumed_at(corpus, run) <= 4, "two steps, and what was trained while they were written"
    launch(corpus, "torchrun", 2, "--run-name", "lost_in_peace", *arguments)
    assert losses(corpus, run) == losses(corpus, "lost_in_peace")


@contextlib.contextmanager
def small_disk(path, megabytes):
    """A file system of its own at ``path``; needs the right to mount one."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_costs_the_saves_that_met_it_and_nothing_else(corpus):
    with small_disk(corpus / "disk", 8) as disk:
        life = Life(corpus, "full", *QUICK, *OFTEN, "--train-iters", "2000", "--save", str(disk))
        assert life.wait_until(lambda: (disk / "latest").exists())
        with (disk / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
        assert life.wait_until(lambda: "the next save tries again" in life.text())
        before = open_checkpoint(disk).step
        assert life.wait_until(lambda: last_step(corpus, "full") > before + 2 * INTERVAL), "training goes on"
        assert open_checkpoint(disk).step == before, "the older one is still whole, and nothing else is there"
        (disk / "filler").unlink()
        assert life.wait_until(lambda: (disk / "latest").read_text() != f"global_step{before}")
        os.kill(ranks_of(life.process)[1].pid, signal.SIGTERM)
        life.process.wait(60)
        status = json.loads((corpus / "runs" / "full" / "status.json").read_text())
        assert (status["state"], status["step"]) == ("preempted", last_step(corpus, "full"))
        assert open_checkpoint(disk).step == status["step"], "one rank was asked to stop, all of them saved"
        assert "No space left" in life.text() and 'pretrain.py", line' not in life.text(), "one line, no traceback"
