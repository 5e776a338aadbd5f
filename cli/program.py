"""How every program ends: one line and an exit code for a user's mistake, and signals that stop it between steps."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from model.errors import UserError

T = TypeVar("T")


def exit_with_one_line(main: Callable[[], T]) -> T:
    """Run a program; a mistake of its user or a full disk ends it with one line and exit code 2, never a traceback."""
    file = Path(sys.argv[0])
    name = file.parent.name if file.name == "__main__.py" else file.name
    rank = int(os.environ.get("RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # as torchrun sets them
    name += f" (process {rank})" if rank else ""
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
    """True for the errors that CUDA, torch's CPU allocator and Python raise when memory runs out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which Ctrl-C and SIGTERM add their number instead of interrupting a step; a second Ctrl-C interrupts.

    A second SIGTERM does not: schedulers send it to every process of a job, and programs pass it on to their children.
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
