"""Work that goes on beside the training, in a thread, one piece at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """What is started runs in order. Whatever it raised is raised by the next call of any method."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._last: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin as soon as the piece before it is done, which is waited for."""
        self.wait()
        self._last = self._thread.submit(job)

    def check(self) -> None:
        """Raise now what the last piece raised, if it is done; wait for nothing."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is under way."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
