"""Ranks that are threads, tensors with every bit pattern, arbitrary splits of them, and children that may die."""

import itertools
import os
import sys
import threading
import traceback
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from megatron_ds.checkpoint.pieces import Fragment

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}
CRASHED = 9
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)


class ThreadPeers:
    """Peers over barriers: the ranks of one world, on one node or several, are threads of this process."""

    def __init__(self, rank, nodes, world):
        self.rank, self.nodes, self._world = rank, nodes, world
        self.world_size = sum(map(len, nodes))
        self.node = next(node for node, ranks in enumerate(nodes) if rank in ranks)
        self.node_ranks = nodes[self.node]

    def gather_objects(self, value):
        self._world.slots[self.rank] = value
        self._world.barrier.wait()
        gathered = list(self._world.slots)
        self._world.barrier.wait()
        return gathered

    def send(self, byte_N, to):
        """Returns once it has been received, like gloo's."""
        link = self._world.link(self.rank, to)
        link.message = byte_N.clone()
        link.barrier.wait()
        link.barrier.wait()

    def receive(self, size, source):
        link = self._world.link(source, self.rank)
        link.barrier.wait()
        message = link.message
        assert message.numel() == size, "sizes differ"
        link.barrier.wait()
        return message


class _World:
    """Where threads meet: all of them, or two."""

    def __init__(self, size):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=30)
        self._links, self._lock = {}, threading.Lock()

    def link(self, source, target):
        with self._lock:
            if (source, target) not in self._links:
                self._links[source, target] = SimpleNamespace(message=None, barrier=threading.Barrier(2, timeout=30))
            if self.barrier.broken:
                self._links[source, target].barrier.abort()
            return self._links[source, target]

    def abort(self):
        with self._lock:
            for barrier in (self.barrier, *(link.barrier for link in self._links.values())):
                barrier.abort()


def on_ranks(world, work):
    """``work(peers)`` on every rank at once; what each returned, or raised, in rank order.

    ``world``: how many ranks, or how many on each node.
    """
    counts = [world] if isinstance(world, int) else world
    ends = list(itertools.accumulate(counts))
    nodes = tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts))
    meeting, results = _World(ends[-1]), [None] * ends[-1]

    def run(rank):
        try:
            results[rank] = work(ThreadPeers(rank, nodes, meeting))
        except BaseException as error:
            results[rank] = error
            if not hasattr(error, "exit_code"):
                meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(ends[-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_child(work):
    """Run ``work`` in a forked child; 0 when it returned, 1 with a traceback when it raised, 9 when it was crashed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_call(number, action, rank=None, for_good=False):
    """From now on this process does ``action`` at its ``number``-th file-system call, or at all from there.

    With ``rank`` only calls of that rank of ``on_ranks`` count. Python's audit events see every open, mkdir, rename and
    removal.
    """
    count = 0

    def on_event(event, arguments=()):
        nonlocal count
        mine = rank is None or threading.current_thread().name == f"rank {rank}"
        if mine and (event in CALLS or event == "os.fsync"):
            count += 1
            if count - 1 == number or (for_good and count - 1 > number):
                action()

    fsync = os.fsync
    os.fsync = lambda descriptor: (on_event("os.fsync"), fsync(descriptor))[1]
    sys.addaudithook(on_event)  # lasts as long as the process: only for children
    return lambda: count


def count_calls(work, rank=None):
    """How many file-system calls ``work`` makes, perhaps only on one rank."""
    read, write = os.pipe()

    def child():
        calls = at_call(-1, None, rank)
        work()
        os.write(write, str(calls()).encode())

    assert in_child(child) == 0
    return int(os.read(read, 20))


def die():
    """End this process at once, as a crash does."""
    os._exit(CRASHED)


def fail():
    """What a full disk says."""
    raise OSError(28, "No space left on device")


def any_bits(shape, dtype, seed=0):
    """A tensor with random bits, so that NaNs and negative zeros are among them."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


def same_bits(a, b):
    """Equal dtype, shape and bits."""
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def cut(tensor, box):
    """The flattened part of a tensor that a box covers: the slow plain oracle."""
    return tensor[tuple(slice(lo, hi) for lo, hi in box)].contiguous().view(-1)


def fragments_of(tensor, name="w", kind="weight", parts=1):
    """A whole tensor as flat fragments of nearly equal length."""
    box, flat = tuple((0, size) for size in tensor.shape), tensor.contiguous().view(-1)
    length = -(-flat.numel() // parts)
    starts = [min(part * length, flat.numel()) for part in range(parts)]
    return [Fragment(name, kind, tuple(tensor.shape), box, s, flat[s : min(s + length, flat.numel())]) for s in starts]


SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def grids(draw, shape):
    """Boxes that tile a shape: every dimension cut at random places, perhaps into nothing."""
    edges = []
    for size in shape:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=2)))
        edges.append(list(itertools.pairwise([0, *cuts, size])))
    return [tuple(box) for box in itertools.product(*edges)]


@st.composite
def splits(draw, tensor, name="w", kind="weight"):
    """Fragments that tile a tensor: a grid of boxes, each in up to four ranges, some of them empty."""
    fragments = []
    for box in draw(grids(tuple(tensor.shape))):
        values = cut(tensor, box)
        cuts = sorted(draw(st.lists(st.integers(0, values.numel()), max_size=3)))
        for lo, hi in itertools.pairwise([0, *cuts, values.numel()]):
            fragments.append(Fragment(name, kind, tuple(tensor.shape), box, lo, values[lo:hi]))
    return draw(st.permutations(fragments))


@st.composite
def requests(draw, shape):
    """A box of a shape and a range inside it: (box, start, length)."""
    box = tuple(tuple(sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape)
    count = torch.Size(hi - lo for lo, hi in box).numel()
    lo, hi = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    return box, lo, hi - lo


def damage(path, chance, files):
    """Change a file in one of seven ways, ``files`` being all of its checkpoint; the file that must be named."""
    content = path.read_bytes()
    kind = chance.choice(["flip", "flip", "flip", "truncate", "delete", "append", "extra", "swap"])
    if kind == "flip":
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
    elif kind == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(content + bytes([chance.randrange(256)]))
    elif kind == "swap":
        path.write_bytes(chance.choice([file for file in files if file.read_bytes() != content]).read_bytes())
    else:
        path = path.with_name("zzz")
        path.write_bytes(b"")
    return path
