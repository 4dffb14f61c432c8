"""What the processes of the schedule benchmark are told: who takes a step, and what there is to do."""

from dataclasses import dataclass

from megatron_ds.pipeline.simulate import Durations


@dataclass(frozen=True)
class Contestant:
    """An engine and what it runs."""

    schedule: str
    """One of ``SCHEDULES``, or "deepspeed" for its own engine with its own schedule."""
    chunks: int = 1
    one_group: bool = False
    """Whether messages of both directions share a process group."""


@dataclass(frozen=True)
class Work:
    """What all contestants have to do."""

    durations: Durations
    """Seconds of a rank's whole stage."""
    length: int
    """Tokens of a micro-batch, of which there is one sequence."""
    hidden: int
