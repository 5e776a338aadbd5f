"""The C++ of model/cpp, for CPUs with AMX: compiled for this one at its first use, and None where it cannot serve."""

import ctypes
import sys
from pathlib import Path

from model.build import BuildError, library
from model.processor import has_amx

_loaded: dict[str, ctypes.CDLL | None] = {}  # once it is there, torch.compile does not look into _load


def native() -> ctypes.CDLL | None:
    if "library" not in _loaded:
        _loaded["library"] = _load()
    return _loaded["library"]


def _load() -> ctypes.CDLL | None:
    if not has_amx():
        return None
    try:
        loaded = library(Path(__file__).parent / "cpp")
    except BuildError as error:
        print(f"note: attention and gradients do without C++ for AMX, and are slower: {error}", file=sys.stderr)
        return None
    for function in (loaded.call_bytes, loaded.ask, loaded.forward_bytes, loaded.backward_bytes):
        function.restype = ctypes.c_long
    place, number = ctypes.c_void_p, ctypes.c_long
    loaded.transpose.argtypes = (place, number, place, number, number, number, ctypes.c_int)
    return loaded if loaded.ask() == 0 else None
