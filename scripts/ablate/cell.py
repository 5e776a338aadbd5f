"""The worker process of one cell: trains or measures it, and exits after saving if the parent process is gone.

`scripts.ablate` starts it and writes one line of JSON to its standard input; the process exits when that is closed.
"""

import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from filelock import FileLock

import train
from artifacts.files import read_json, write_json
from artifacts.run_dir import RunDir
from cli.program import exit_with_one_line
from configs.load import build
from configs.schema import RunConfig

FILE = "cell.json"  # in the run's directory: the measuring commands that have finished


def measured(run: Path) -> list[list[str]]:
    """The measuring commands that have finished for this run."""
    file = run / FILE
    return read_json(file, keys=["measured"], advice="remove it")["measured"] if file.is_file() else []


def train_cell(config: RunConfig) -> None:
    """Start or resume training; exits with the code that train.py would exit with."""
    if RunDir(config.path).summary() is None:
        (config.path / FILE).unlink(missing_ok=True)  # measured with other weights
    try:
        result = train.run(config)
    except train.DivergedError as error:
        sys.exit(str(error))
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)


def measure_cell(run: Path, command: list[str]) -> None:
    """Run the command's module on the run, as `python -m` would, and record that it is done."""
    if command in (done := measured(run)):
        return
    module, *arguments = command
    sys.argv = [module, str(run), *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    write_json(run / FILE, {"measured": [*done, command]})


def _end_with_starter() -> None:
    while os.read(0, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)


def do(job: dict[str, Any]) -> None:
    """Train or measure the run under its lock: an earlier process whose parent was killed may still be saving."""
    run = Path(job["run"])
    run.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(run.with_name(run.name + ".lock")):
        if "config" in job:
            train_cell(build(RunConfig, job["config"]))
        else:
            measure_cell(run, job["command"])


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_starter, daemon=True).start()
    do(job)


if __name__ == "__main__":
    exit_with_one_line(main)
