"""What compilers make here: where it is kept, and libraries of C++."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from model import processor

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
    sources = sorted(folder.iterdir())
    key = hashlib.sha256(b"\0".join([*(source.read_bytes() for source in sources), *map(str.encode, FLAGS)]))
    path = _place("cpp") / f"{folder.name}-{key.hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or not whole
        _compile([source for source in sources if source.suffix == ".cpp"], path)
    return ctypes.CDLL(str(path))


def _compile(sources: list[Path], path: Path) -> None:
    if (command := compiler()) is None:
        raise BuildError("no C++ compiler here")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:  # other processes may be at it too
            made = Path(own) / path.name
            done = subprocess.run([command, *FLAGS, *map(str, sources), "-o", made], capture_output=True, text=True)
            if done.returncode != 0:
                said = [line for line in done.stderr.splitlines() if "error" in line] or [
                    f"exit status {done.returncode}"
                ]
                raise BuildError(said[0])
            made.replace(path)
    except OSError as error:
        raise BuildError(str(error)) from error


def _place(kind: str) -> Path:
    """Processors that differ have folders of their own."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sash" / kind / processor.fingerprint()
