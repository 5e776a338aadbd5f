"""The process of a cell: trains it, or measures it, alone; and ends, having saved, when whoever started it is gone.

It is started by `scripts.ablate` with a line of JSON on its standard input, and lives until that is closed.
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

FILE = "cell.json"  # in the run's directory: the commands that have measured it


def measured(run: Path) -> list[list[str]]:
    """The commands that have measured the trained run."""
    file = run / FILE
    return read_json(file, keys=["measured"], advice="remove it")["measured"] if file.is_file() else []


def train_cell(config: RunConfig) -> None:
    """Train, or go on; ends the process as train.py does."""
    if RunDir(config.path).summary() is None:
        (config.path / FILE).unlink(missing_ok=True)  # of other weights
    try:
        result = train.run(config)
    except train.DivergedError as error:
        sys.exit(str(error))
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)


def measure_cell(run: Path, command: list[str]) -> None:
    """Call the command's program for the run, as `python -m` would, and note that it is done."""
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
    """Train or measure the run, alone: a process whose starter was killed may still be saving it."""
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
