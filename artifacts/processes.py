"""The processes that write one run together, as far as files need to know about them."""

from typing import Protocol


class Processes(Protocol):
    """Satisfied by `training.distributed.DistributedContext`."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        ...

    def barrier(self) -> None:
        """Return when every process has called it."""
        ...

    def all_reduce_max(self, value: int = 0) -> int:
        """The largest value that any process passed."""
        ...


class SingleProcess:
    """One process by itself."""

    is_main = True

    def barrier(self) -> None:
        pass

    def all_reduce_max(self, value: int = 0) -> int:
        return value


SINGLE_PROCESS = SingleProcess()
