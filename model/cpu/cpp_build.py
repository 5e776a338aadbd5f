"""What compilers make here: where it is kept, and libraries of C++."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from model.cpu import processor

COMPILERS = ("g++", "clang++", "c++", "cl")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class BuildError(Exception):
    """Nothing to compile with, or what the compiler said, in one line."""


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def keep_compiled_code() -> None:
    """What torch compiles serves later runs on such a processor; torch would keep it where temporary files are."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_place("inductor")))


def library(folder: Path) -> ctypes.CDLL:
    """The C++ of a folder, compiled for this processor unless that was done before. BuildError where it cannot be."""
    sources = [*sorted(folder.glob("*.h")), *sorted(folder.glob("*.cpp"))]
    key = hashlib.sha256(b"\0".join([*(source.read_bytes() for source in sources), *map(str.encode, FLAGS)]))
    path = _place("cpp") / f"{folder.name}-{key.hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or not whole
        _compile(folder, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a place that nothing may be run from, say
        raise BuildError(str(error)) from error


def _compile(folder: Path, path: Path) -> None:
    if (command := compiler()) is None:
        raise BuildError("no C++ compiler here")
    print(f"note: compiling {os.path.relpath(folder)} for this processor, once", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:  # other processes may be at it too
            made = Path(own) / path.name
            call = [command, *FLAGS, *map(str, sorted(folder.glob("*.cpp"))), "-o", str(made)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise BuildError(errors[0] if errors else f"{command} ended with {done.returncode}")
            made.replace(path)
    except OSError as error:
        raise BuildError(str(error)) from error


def _place(kind: str) -> Path:
    """Processors that differ have folders of their own."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sash" / kind / processor.fingerprint()
