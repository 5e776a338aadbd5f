"""The switch for CPU-specific code: SASH_CPU=off in the environment, or the context manager `switched_off`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_on = os.environ.get("SASH_CPU", "on").lower() not in ("off", "0", "false")


def is_on() -> bool:
    """Whether Sash's own CPU code may replace torch's operators."""
    return _on


@contextmanager
def switched_off() -> Iterator[None]:
    """Use only torch's operators, in all threads, within the block."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before
