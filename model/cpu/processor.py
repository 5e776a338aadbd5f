"""Features of this processor, which decide between kernels by measured speed."""

import zlib

import torch


def features() -> dict[str, object]:
    """CPU capabilities by torch's names; empty if this version of torch does not report them."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def name() -> str:
    """Name of the processor, if torch reports it, and the number of threads."""
    known, threads = features().get("cpu_name"), f"{torch.get_num_threads()} threads"
    return f"{known}, {threads}" if known else threads


def fingerprint() -> str:
    """An identifier shared only by processors that can run each other's compiled code."""
    return f"{_vectors()}-{zlib.crc32(repr(sorted(features().items())).encode()):08x}".lower()


def has_amx() -> bool:
    """Whether there are bfloat16 matrix instructions (AMX), which not all of torch's kernels use."""
    return bool(features().get("amx_bf16")) and _vectors() == "AVX512"


def multiplies_bf16() -> bool:
    return any(on for name, on in features().items() if name.endswith("bf16"))


def has_avx512_bf16() -> bool:
    """Whether there are bfloat16 vector instructions, for which torch's fused attention repacks keys and values."""
    return bool(features().get("avx512_bf16")) and _vectors() == "AVX512"


def convolves() -> bool:
    """Whether linear layers are faster as convolutions: on AMD processors with AVX-512, but not on Intel's with AMX."""
    amd = str(features().get("cpu_name")).startswith("AMD")
    return amd and _vectors() == "AVX512" and torch.backends.mkldnn.is_available()


def _vectors() -> str:
    """The vector instruction set that torch's kernels use, which ATEN_CPU_CAPABILITY may limit."""
    return torch.backends.cpu.get_cpu_capability()
