"""Configure glibc's allocator to keep the memory of freed tensors."""

import ctypes
import os
import sys

from model.cpu.switch import is_on

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in the process, so that each page is mapped and cleared once, not every step.

    If called before the first tensor is created, it also enables huge pages. Costs 2 to 5 % more peak memory and saves
    about as much time.
    """
    if not is_on():
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
