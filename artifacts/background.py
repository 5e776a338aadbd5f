"""The thread that writes checkpoints while training goes on.

It belongs to the artifacts because they alone have such work: a run directory copies the tensors, and this thread
serialises, hashes and syncs them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one job at a time, in order. An exception in a job is raised by the next call of any method."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._last: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the previous job, then start this one."""
        self.wait()
        self._last = self._thread.submit(job)

    def check(self) -> None:
        """Raise the exception of the last job if it has ended; never blocks."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Block until no job is running."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the last job and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
