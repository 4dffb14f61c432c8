"""Tiers: one snapshot in main memory, written to any number of places by a thread for each.

A tier is a store with its own thread, so a slow disk delays its own tier only: all of them write the snapshot, none
reads what another wrote. A save waits until its tiers have written the one before: that bounds the memory, and how far
training can run ahead of its checkpoints. Every rank has the same tiers and saves the same steps in the same order; the
ranks of a store meet on its thread. A save that fails costs nothing but itself: it becomes an ``Outcome``.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import LifoQueue, SimpleQueue
from threading import Lock
from typing import Protocol, Unpack

from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.staging import Staging
from megatron_ds.checkpoint.writing import Content, SaveReport
from megatron_ds.errors import MegatronError


class Store(Protocol):
    """A place for checkpoints; every rank calls it."""

    def save(self, step: int, fragments: Iterable[Fragment], **content: Unpack[Content]) -> SaveReport:
        """Write a checkpoint; CheckpointError on every rank when it fails on one."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to say of a step: the arguments of ``Store.save``."""

    step: int
    fragments: Iterable[Fragment]
    content: Content


@dataclass(frozen=True)
class Outcome:
    """What became of a snapshot in one tier."""

    tier: str
    step: int
    report: SaveReport | None
    """None when the save failed."""
    error: MegatronError | None
    """Why it failed."""


@dataclass(frozen=True)
class Followed:
    """What came of that which follows a save."""

    notes: tuple[str, ...]
    """Lines for the user."""
    error: MegatronError | None
    """Why it failed."""


@dataclass(frozen=True)
class Tier:
    """A store, and what happens on its thread after each checkpoint that was written to it."""

    name: str
    store: Store
    after: Callable[[int, SaveReport], list[str]] = lambda step, report: []
    """Called on every rank with the step; returns lines for the user."""


class TieredSaver:
    """Copies snapshots and has them written; ``outcomes`` tells how that went."""

    def __init__(self, tiers: Iterable[Tier]) -> None:
        self._tiers = list(tiers)
        self._threads = {
            tier.name: ThreadPoolExecutor(1, thread_name_prefix=f"save_{tier.name}") for tier in self._tiers
        }
        # Last in, first out: while one buffer is enough, the other takes no memory.
        self._free: LifoQueue[Staging] = LifoQueue()
        for _ in self._tiers:
            self._free.put(Staging())
        self._writing: dict[str, Future[None]] = {}
        self._outcomes: SimpleQueue[Outcome | Followed] = SimpleQueue()

    def save(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        """Copy a snapshot and hand it to the named tiers; waits for the copy, and until they are free.

        Raises what ``wait`` raises.
        """
        tiers = [tier for tier in self._tiers if tier.name in set(names)]
        for tier in tiers:
            self._settle(tier.name)
        staging = self._free.get()  # there is one: as many tiers are free
        held = replace(snapshot, fragments=staging.hold(snapshot.fragments))
        done = _Countdown(len(tiers), lambda: self._free.put(staging))
        for tier in tiers:
            self._writing[tier.name] = self._threads[tier.name].submit(self._write, tier, held, done)

    def outcomes(self) -> list[Outcome | Followed]:
        """What ended since the last call, in the order in which it did."""
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def wait(self) -> None:
        """Wait until nothing is left to write. Raises what a thread raised that is not a failed save: a lost rank."""
        for tier in self._tiers:
            self._settle(tier.name)

    def close(self) -> None:
        """Write what is left and end the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True)

    def _settle(self, name: str) -> None:
        """Wait until a tier has written what it was given."""
        if name in self._writing:
            self._writing.pop(name).result()

    def _write(self, tier: Tier, snapshot: Snapshot, done: "_Countdown") -> None:
        report, error = None, None
        try:
            report = tier.store.save(snapshot.step, snapshot.fragments, **snapshot.content)
        except MegatronError as raised:
            error = raised
        finally:
            done()  # what follows needs the files only
        self._outcomes.put(Outcome(tier.name, snapshot.step, report, error))
        if report:
            try:
                self._outcomes.put(Followed(tuple(tier.after(snapshot.step, report)), None))
            except MegatronError as raised:
                self._outcomes.put(Followed((), raised))


class _Countdown:
    """Calls ``then`` when it was called ``count`` times, from any thread."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then, self._lock = count, then, Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()
