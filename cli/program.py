"""What programs share: how they end when their user is wrong, and when they are told to stop."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from model.errors import UserError
from training.distributed import rank

T = TypeVar("T")


def exit_with_one_line(main: Callable[[], T]) -> T:
    """Run a program; what its user got wrong, or a full disk, is one line and exit code 2, never a traceback."""
    file = Path(sys.argv[0])
    name = file.parent.name if file.name == "__main__.py" else file.name
    name += f" (process {rank()})" if rank() else ""
    try:
        return main()
    except UserError as error:
        print(f"{name}: {error}\n", end="", file=sys.stderr)  # one write: processes share it
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is left in buffers goes when Python ends
        print(f"{name}: standard output was closed", file=sys.stderr)
        raise SystemExit(128 + 13) from None  # as SIGPIPE, which Windows does not have
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{name}: {error.strerror}{where}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: there is not enough memory: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    raise SystemExit(2)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory was wanting, as a device, a CPU or Python says it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def at_least(options: object, **least: int) -> None:
    """UserError for the first of these options whose number, or one of several, is below its least."""
    for name, lowest in least.items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number < lowest:
                raise UserError(f"--{name.replace('_', '-')} ({number}) must be at least {lowest}")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM fill instead of breaking into a step; a second Ctrl-C does not wait for the step.

    A second SIGTERM does not: schedulers send it to every process of a job, and programs send it on to theirs.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
