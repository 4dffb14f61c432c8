"""Preemption: a scheduler that wants the machine back says so with a signal, some seconds before it takes it.

The first SIGTERM or SIGUSR1 is only noted; the loop asks after every step, all ranks agree, save and end with an exit
code that tells the scheduler to start the job again. A second signal ends the process at once.
"""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Whether this process was asked to stop, within a ``with`` statement in the main thread."""

    requested = False

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def settle(self) -> None:
        """Ignore further signals, also after the ``with``: everything is saved, and what is left takes a moment."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
