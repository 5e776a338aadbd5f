"""What this processor has, where that decides which of several ways was measured to be the faster one."""

import zlib

import torch


def features() -> dict[str, object]:
    """By torch's names; none where torch cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def name() -> str:
    """As far as torch knows it, and the threads that it is used with."""
    known, threads = features().get("cpu_name"), f"{torch.get_num_threads()} threads"
    return f"{known}, {threads}" if known else threads


def fingerprint() -> str:
    """A name that processors share only if they run each other's compiled code."""
    return f"{_vectors()}-{zlib.crc32(repr(sorted(features().items())).encode()):08x}".lower()


def has_amx() -> bool:
    """Whether it multiplies matrices of bfloat16 in tiles of its own, which not all of torch's kernels use."""
    return bool(features().get("amx_bf16")) and _vectors() == "AVX512"


def multiplies_bf16() -> bool:
    return any(on for name, on in features().items() if name.endswith("bf16"))


def has_avx512_bf16() -> bool:
    """Whether it multiplies vectors of bfloat16, and torch's fused attention lays keys and values out for that."""
    return bool(features().get("avx512_bf16")) and _vectors() == "AVX512"


def convolves() -> bool:
    """Whether products with weights are faster as convolutions: on AMD's with AVX-512, and not with Intel's AMX."""
    amd = str(features().get("cpu_name")).startswith("AMD")
    return amd and _vectors() == "AVX512" and torch.backends.mkldnn.is_available()


def _vectors() -> str:
    """What torch's kernels use: less than there is where ATEN_CPU_CAPABILITY says so."""
    return torch.backends.cpu.get_cpu_capability()
