"""Errors that a user can cause, each with the exit code its kind has everywhere (docs/exit_codes.md).

They carry the place, the value, the rule and the fix in one message; entry points print it without a traceback.
``assert`` stays for our own bugs.
"""

import os
import signal
import sys
from collections.abc import Callable


class MegatronError(Exception):
    """Base of every error that ends a command with a message and an exit code."""

    exit_code = 1


class ConfigError(MegatronError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DataError(MegatronError):
    """A corpus, an index or a tokenizer cannot be used."""

    exit_code = 3


class CheckpointError(MegatronError):
    """A checkpoint is damaged or does not fit."""

    exit_code = 4


class DivergedError(MegatronError):
    """The loss or the gradient norm is not finite."""

    exit_code = 5


class PreemptedError(MegatronError):
    """The job was asked to stop by a signal, and has saved; started again, it goes on."""

    exit_code = 75


class SelfTestError(MegatronError):
    """A topology does not compute what one process computes: a fault of ours, or of a library, never to train with."""


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point: its return value or the error's code becomes the exit code, errors print as one message.

    All ranks of a job read the same configuration, so only the first one prints what is wrong with it.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main(sys.argv[1:]) or 0
    except MegatronError as error:
        if rank == 0 or not isinstance(error, ConfigError | PreemptedError):
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)
