"""Device, dtype and compilation of a run, and the speed limits of the device."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from model import cpu
from model.errors import UserError

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def long_dtype(name: str) -> str:
    """The name that torch uses: bf16 is bfloat16."""
    return SHORT_DTYPES.get(name, name)


DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"], AfterValidator(long_dtype)
]  # in a Section always a long name; where no validator runs, `resolve` takes either
Switch = Literal["auto", "on", "off"]

COMPILE_FROM_FLOPS = 2e14  # on a CPU compiling takes 10 s and saves 2 to 12 %: shorter jobs would lose


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The device, dtype and compilation that were chosen, and why."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    why: str

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matmuls in `dtype`, the rest in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Copy host tensors to the device; on CUDA from pinned memory, so that the copy overlaps with work."""
        if self.device.type == "cuda":
            pair = pair[0].pin_memory(), pair[1].pin_memory()
        return pair[0].to(self.device, non_blocking=True), pair[1].to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def resolve(device: str = "auto", dtype: DType = "auto", compile: Switch = "auto", *, flops: float = 0) -> Runtime:
    """Choose by the capabilities of the hardware; `flops` is the size of the job. UserError for a missing device."""
    kind, why_device = _device(device)
    if kind.type == "cpu":
        cpu.keep_freed_memory()
    chosen_dtype, why_dtype = _dtype(kind, dtype)
    chosen_compile, why_compile = _compile(kind, compile, flops)
    if chosen_compile:
        cpu.keep_compiled_code()
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else cpu.processor_name()
    why = (
        f"device {kind} ({name}{why_device}), dtype {str(chosen_dtype).removeprefix('torch.')} ({why_dtype}), "
        f"compile {'on' if chosen_compile else 'off'} ({why_compile})"
    )
    return Runtime(device=kind, dtype=chosen_dtype, compile=chosen_compile, why=why)


def _device(asked: str) -> tuple[torch.device, str]:
    here = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if asked == "auto":
        return torch.device(here[0]), ""
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"device ({asked}) is unknown; here there is {', '.join(here)}, or auto") from None
    if device.type not in here or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device ({asked}) is not there; here there is {', '.join(here)}: take one of them, or auto")
    return device, ", as asked"


def _dtype(device: torch.device, asked: DType) -> tuple[torch.dtype, str]:
    if asked != "auto":
        return getattr(torch, long_dtype(asked)), "as asked"
    if device.type == "mps":
        return torch.float32, "bfloat16 is slower on mps"
    return (
        (torch.bfloat16, "multiplied natively here")
        if _multiplies_bf16(device)
        else (torch.float32, "no native bfloat16 here")
    )


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu.multiplies_bf16()


def _compile(device: torch.device, asked: Switch, flops: float) -> tuple[bool, str]:
    if asked != "auto":
        return asked == "on", "as asked"
    if (obstacle := no_compiling(device)) is not None:
        return False, obstacle
    if device.type == "cuda":
        return True, "pays on cuda"
    return (True, "a long job") if flops >= COMPILE_FROM_FLOPS else (False, "too short a job to pay for it")


def no_compiling(device: torch.device) -> str | None:
    """Why `auto` does not compile on this device; None if it may."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "no triton here"
    if device.type == "mps":
        return "eager is the safe choice on mps"
    return "no C++ compiler here" if cpu.compiler() is None else None


def compile_blocks(model: nn.Module) -> None:
    """Compile each layer in place. Equal layers share one compilation, so depth adds no compile time."""
    for block in model.h:  # type: ignore[union-attr]
        block.compile()


def memory_at_hand(device: torch.device) -> int | None:
    """Bytes that this process holds or can still allocate on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def memory_rate(runtime: Runtime, seconds: float = 0.5) -> float:
    """Measured memory bandwidth in bytes/s, for a sum over more data than any cache holds: the limit of decoding."""
    x = torch.ones(1 << 26, device=runtime.device)  # 256 MiB
    return x.nbytes / _fastest(x.sum, runtime, seconds)


def _fastest(work: Callable[[], Tensor], runtime: Runtime, seconds: float) -> float:
    """Seconds of the fastest of as many repetitions as fit into `seconds`."""
    work().sum().item()  # warm up
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        runtime.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(runtime: Runtime, seconds: float = 0.2) -> float:
    """Measured FLOP/s of large square matmuls in the runtime's dtype: the denominator of MFU."""
    n = 8192 if runtime.device.type == "cuda" else 2048
    own = torch.Generator(runtime.device).manual_seed(0)  # leaves the training RNG alone
    a, b = (torch.randn(n, n, generator=own, device=runtime.device, dtype=runtime.dtype) for _ in "ab")
    return (
        2 * n**3 / min(_fastest(work, runtime, seconds / 2) for work in (lambda: a @ b, lambda: cpu.grad_input(a, b)))
    )
