"""Peak memory of a piece of work, measured, with the method's name beside it; bytes of tensors that are there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.gpt import GPT


@dataclass(slots=True)
class PeakMemory:
    """Filled in when its block ends; what could not be measured stays None."""

    method: str
    bytes: int | None = None  # live tensors at their peak
    reserved_bytes: int | None = None  # what the device's allocator held for them
    process_bytes: int | None = None  # the process's high-water mark, with freed memory that it keeps


@contextmanager
def measure_peak(device: torch.device, held: Iterable[Tensor] = ()) -> Iterator[PeakMemory]:
    """Measure the peak over the block. `held`: on a CPU, the tensors that live before it and count too.

    Warm up first: a first pass allocates what later ones find. On a CPU the figure is the sum of allocations and frees
    that the profiler saw, kernels' work space included, on top of `held`: the same from run to run.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak = PeakMemory(method="cuda-allocator")
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        peak.reserved_bytes = torch.cuda.max_memory_reserved(device)
    elif device.type == "cpu":
        base = total_bytes(held)
        peak = PeakMemory(method="cpu-live-tensors")
        reset = _reset_process_peak()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield peak
        changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for change in sorted(changes, key=lambda e: e.start_ns()):
            live += change.nbytes()
            highest = max(highest, live)
        peak.bytes = base + highest
        peak.process_bytes = process_peak_bytes() if reset else None
    else:
        yield PeakMemory(method=f"not measured on {device.type}")


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    return sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}.values())


def step_bytes(model: GPT) -> int:
    """Weights that one step of decoding reads, whatever the batch: all but embeddings, of which it takes a row."""
    looked_up = [] if model.config.tie_embeddings else [model.wte.weight]
    looked_up += [] if model.wpe is None else [model.wpe.weight]
    return total_bytes([*model.parameters(), *model.buffers()]) - total_bytes(looked_up)


def device_peak(device: torch.device) -> tuple[str, int | None]:
    """The largest memory so far and how it was measured: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return "cuda-allocator", torch.cuda.max_memory_allocated(device)
    peak = process_peak_bytes()
    return ("process", peak) if peak else ("not measured", None)


def process_peak_bytes() -> int | None:
    """The largest resident size of this process so far (on Linux since the last reset); None where unknown."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_process_peak() -> bool:
    """Linux forgets its high-water mark when asked to."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return False
    return True
