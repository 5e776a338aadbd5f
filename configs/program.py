"""What programs share: how they end when their user is wrong, and when they are told to stop."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from model.errors import UserError
from model.parallel import rank

T = TypeVar("T")


def exit_with_one_line(main: Callable[[], T]) -> T:
    """Run a program; what its user got wrong, or a full disk, is one line and exit code 2, never a traceback."""
    name = Path(sys.argv[0]).name + (f" (process {rank()})" if rank() else "")
    try:
        return main()
    except UserError as error:
        print(f"{name}: {error}\n", end="", file=sys.stderr)  # one write: processes share it
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{name}: {error.strerror}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    raise SystemExit(2)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM fill instead of breaking into a step; a second one stops at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
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
