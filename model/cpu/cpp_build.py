"""Compile C++ libraries, and cache compiled code by processor."""

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
    """There is no compiler, or it failed; the message is one line."""


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def keep_compiled_code() -> None:
    """Cache code compiled by torch for later runs on this kind of processor; torch's default is a temp directory."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_place("inductor")))


def library(folder: Path) -> ctypes.CDLL:
    """Load the C++ library of a folder, compiling it for this processor if necessary. BuildError if that fails."""
    sources = [*sorted(folder.glob("*.h")), *sorted(folder.glob("*.cpp"))]
    key = hashlib.sha256(b"\0".join([*(source.read_bytes() for source in sources), *map(str.encode, FLAGS)]))
    path = _place("cpp") / f"{folder.name}-{key.hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # missing or incomplete
        _compile(folder, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # for example on a noexec file system
        raise BuildError(str(error)) from error


def _compile(folder: Path, path: Path) -> None:
    if (command := compiler()) is None:
        raise BuildError("no C++ compiler here")
    print(f"note: compiling {os.path.relpath(folder)} for this processor, once", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:  # other processes may be compiling too
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
    """The cache directory, separate for each kind of processor."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sash" / kind / processor.fingerprint()
