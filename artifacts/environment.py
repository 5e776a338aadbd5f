"""The environment of a run, as config.json records it."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.device import Runtime


def environment(runtime: Runtime) -> dict[str, Any]:
    """Versions, device and git commit of a run."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "tiktoken")}},
        "runtime": runtime.why,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checked-out commit, with "+changes" where files differ; None outside a repository."""
    root = Path(__file__).resolve().parent
    try:
        git = lambda *args: subprocess.run(("git", *args), cwd=root, capture_output=True, text=True, check=True).stdout
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
