"""The C++ operators in model/cpu/cpp, for CPUs with AMX; compiled on first use."""

import ctypes
import sys
from pathlib import Path

from model.cpu.cpp_build import BuildError, library
from model.cpu.processor import has_amx

_loaded: dict[str, ctypes.CDLL | None] = {}  # once filled, torch.compile does not trace into _load


def cpp_ops() -> ctypes.CDLL | None:
    """The compiled library; None without AMX or a compiler, or if it cannot be loaded."""
    if "library" not in _loaded:
        _loaded["library"] = _load()
    return _loaded["library"]


def _load() -> ctypes.CDLL | None:
    if not has_amx():
        return None
    try:
        loaded = library(Path(__file__).parent / "cpp")
    except BuildError as error:
        print(
            f"note: no C++ for attention, gradients and the loss, which are slower without it: {error}", file=sys.stderr
        )
        return None
    for function in (loaded.call_bytes, loaded.ask, loaded.forward_bytes, loaded.backward_bytes):
        function.restype = ctypes.c_long
    place, number, n_threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    loaded.transpose.argtypes = (place, number, place, number, number, number, n_threads)
    loaded.loss_and_grad.argtypes = (place,) * 4 + (number,) * 3 + (ctypes.c_float, n_threads)
    return loaded if loaded.ask() == 0 else None
