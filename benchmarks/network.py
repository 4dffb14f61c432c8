"""A cluster on one machine: hosts in network namespaces, joined by links of a chosen speed, and processes on them.

A star: every host is a namespace with one interface, ``nic``, whose other end hangs on a bridge in a namespace of its
own. ``shape`` limits both ends of every link with a token bucket (tbf), so a host sends and receives at that rate at
once, as a full-duplex network card does. Ranks of one host reach each other over its loopback, which is not limited.

Three settings matter to the numbers. TCP runs cubic, because bbr, the default of some machines, paces by its own idea
of the link. The queue holds 1 MB: with 4 MB the senders fill it and everything behind waits. Frames are jumbo (MTU
9000), as in clusters; headers are then 0.7 % of the bytes instead of 4.6 %, and this machine, which is also all the
hosts and the switch, spends less of its time on them.

Everything is made by name (``mds<pid>...``) inside namespaces that ``Network`` created itself and is removed with
them, after an error or Ctrl-C too; the one setting of the machine that is touched, the list of congestion controls
that namespaces may use, is put back. Needs Linux, root and iproute2; ``obstacle`` says what is missing.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

INTERFACE = "nic"
"""Name of a host's interface, the same on all of them."""

BURST, QUEUE = 256 * 1024, 1024 * 1024
"""Bytes that a link lets pass at once after a pause, and bytes that wait in front of it."""

MTU = 9000
CONGESTION_CONTROLS = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


class Network:
    """``hosts`` namespaces in a star, unshaped until ``shape`` is called. Use it in a ``with`` statement."""

    interface, port = INTERFACE, 29500

    def __init__(self, hosts: int) -> None:
        self.names = [f"mds{os.getpid()}h{host}" for host in range(hosts)]
        self._switch = f"mds{os.getpid()}switch"
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Network":
        try:
            with _uninterrupted():
                self._build()
        except BaseException:  # also a signal that waited
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            self._undo.close()

    def address(self, host: int) -> str:
        """IP address of a host; private to this network."""
        return f"10.77.0.{host + 1}"

    def entry(self, host: int) -> list[str]:
        """What a command has to begin with in order to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def shape(self, mbit: int, burst: int = BURST) -> None:
        """Limit every link to ``mbit`` Mbit/s in each direction; 0 takes the limit away.

        ``burst``: bytes that pass at once after a pause, which must be few beside a message that follows a pause.
        """
        for host, name in enumerate(self.names):
            for namespace, interface in ((name, INTERFACE), (self._switch, f"port{host}")):
                _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *_discipline(mbit, burst))

    def _build(self) -> None:
        self._undo.enter_context(_cubic_allowed())
        self._namespace(self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "mtu", str(MTU), "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self.names):
            self._namespace(name)
            self._plug_in(host)

    def _namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._undo.callback(_run, "ip", "netns", "delete", name)

    def _plug_in(self, host: int) -> None:
        name, port = self.names[host], f"port{host}"
        _run(
            "ip", "-n", name, "link", "add", INTERFACE, "mtu", str(MTU), "type", "veth",
            "peer", "name", port, "mtu", str(MTU), "netns", self._switch,
        )  # fmt: skip
        _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=cubic")


class Loopback:
    """This machine as the only host, in place of a ``Network``: no namespace, no limit, nothing that it needs."""

    names, interface = ("localhost",), "lo"

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]

    def address(self, host: int) -> str:
        """That of the loopback interface."""
        return "127.0.0.1"

    def entry(self, host: int) -> list[str]:
        """Nothing: commands run here."""
        return []


class Ranks:
    """Processes on the hosts of a network, alive until the ``with`` statement ends; ``call`` runs one function in all.

    ``script`` is a Python file whose main part ends in ``network.serve(functions)``; its ranks have the environment
    that ``torch.distributed`` expects and are ordered by host. What they print is dropped, except to stderr.
    """

    def __init__(self, network: Network | Loopback, script: Path, ranks_per_host: int = 1) -> None:
        self.network, self.script, self.ranks_per_host = network, script, ranks_per_host
        self.size = len(network.names) * ranks_per_host
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Ranks":
        try:
            for rank in range(self.size):
                self._start(rank)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            for process in self._processes:
                process.kill()
            for process, pipe in zip(self._processes, self._pipes):
                process.wait()
                pipe.close()

    def call(self, name: str, *arguments: Any, timeout: float = 600.0) -> list[Any]:
        """``name(*arguments)`` on every rank; the results in rank order. RuntimeError when one fails or is silent."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.size:
            silent = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(silent, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{name}: no answer from {len(silent)} of {self.size} ranks within {timeout:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"{name}: rank {rank} ended; what it said stands above") from None
        return [results[rank] for rank in range(self.size)]

    def _start(self, rank: int) -> None:
        # LOCAL_SIZE=1: DeepSpeed must not take the ranks for processes that share memory.
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
            "LOCAL_WORLD_SIZE": str(self.ranks_per_host), "MASTER_ADDR": self.network.address(0),
            "MASTER_PORT": str(self.network.port), "GLOO_SOCKET_IFNAME": self.network.interface, "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        ours, theirs = Pipe()
        self._pipes.append(ours)
        entry = self.network.entry(rank // self.ranks_per_host)
        command = [*entry, sys.executable, str(self.script), str(theirs.fileno())]
        # In a session of its own, Ctrl-C does not reach it: this process ends the ranks, and then the network.
        self._processes.append(
            subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, stdout=subprocess.DEVNULL
            )
        )
        theirs.close()


def serve(functions: dict[str, Callable[..., Any]]) -> None:
    """Be a rank: answer the calls of the ``Ranks`` that started this process until it goes away."""
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            pipe.send(functions[name](*arguments))


def sent_bytes(interface: str = INTERFACE) -> int:
    """Bytes, frames and acknowledgements included, that an interface of this process's host has sent so far."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def obstacle() -> str | None:
    """Why no network can be built here, in words; None when one can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "sysctl"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (package iproute2 or procps)"
    try:
        with Network(hosts=1) as network:
            network.shape(100)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this kernel refuses a shaped namespace: {getattr(error, 'stderr', None) or error}".strip()
    return None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn the first SIGTERM or Ctrl-C into an exception, so that ``with`` statements clean up, and ignore later ones.

    Who ends a whole group of processes may send a second one, which must not end the cleaning.
    """

    def leave(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the body is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _cubic_allowed() -> Iterator[None]:
    """Let namespaces use cubic; the list of before is put back."""
    before = CONGESTION_CONTROLS.read_text().strip()
    if "cubic" in before.split():
        yield
        return
    CONGESTION_CONTROLS.write_text(f"{before} cubic")
    try:
        yield
    finally:
        CONGESTION_CONTROLS.write_text(before)


def _discipline(mbit: int, burst: int) -> list[str]:
    if mbit == 0:
        return ["pfifo"]
    return ["tbf", "rate", f"{mbit}mbit", "burst", str(burst), "limit", str(QUEUE)]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
