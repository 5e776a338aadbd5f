"""The one switch of the CPU's own code: SASH_CPU=off in the environment, or a block of code."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_on = os.environ.get("SASH_CPU", "on").lower() not in ("off", "0", "false")


def is_on() -> bool:
    """Whether code of our own may take the place of torch's operators."""
    return _on


@contextmanager
def switched_off() -> Iterator[None]:
    """Torch's own operators alone, in all threads, until the block ends."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before
