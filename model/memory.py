"""Peak memory, measured, with the name of the method."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class PeakMemory:
    """Filled in when the measured block ends; None where a figure could not be measured."""

    method: str
    bytes: int | None = None  # live tensors at their peak
    reserved_bytes: int | None = None  # what the device's allocator held for them
    process_bytes: int | None = None  # peak resident size of the process, with freed memory that it keeps


@contextmanager
def measure_peak(device: torch.device, held: Iterable[Tensor] = ()) -> Iterator[PeakMemory]:
    """Measure the peak over the block. On a CPU, `held` are tensors that exist before it and count too.

    Warm up first: a first pass allocates buffers that later ones reuse. On a CPU the figure is computed from the
    allocations and frees that the profiler records, workspaces included, on top of `held`: the same in every run.
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
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
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
    """Bytes of the storages of the tensors, each counted once."""
    return sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}.values())


def device_peak(device: torch.device) -> tuple[str, int | None]:
    """The method and the peak memory so far: the allocator's on CUDA, else the resident size of the process."""
    if device.type == "cuda":
        return "cuda-allocator", torch.cuda.max_memory_allocated(device)
    peak = process_peak_bytes()
    return ("process", peak) if peak else ("not measured", None)


def process_peak_bytes() -> int | None:
    """Peak resident size of this process (on Linux since the last reset); None where unknown."""
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
    """Reset the peak resident size, which Linux allows; False elsewhere."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return False
    return True
