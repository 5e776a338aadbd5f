"""Run a study, and report what it came to:  python -m scripts.ablate configs/ablations/window.toml

The same command repeated goes on where it was stopped or killed, and runs again what failed.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from filelock import FileLock

from artifacts.files import write_json
from artifacts.run_dir import RunDir
from cli.program import at_least, exit_with_one_line
from data.prepare import prepare
from model.errors import UserError
from scripts.ablate.plan import plan
from scripts.ablate.runner import Runner
from scripts.ablate.study import Cell, Study, cells, check_commands, load_study
from scripts.report.collect import STUDY
from scripts.report.write import report


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train every variant of a study with every seed, each in a process of its own; measure each; report.

    A study is a TOML file with a base config, variants or a grid, and seeds: see docs/ablations.md.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """The study's TOML file."""
    dry_run: bool = False
    """Show the cells with an estimate of their time and memory, and run nothing."""
    jobs: int = 1
    """How many cells run at a time, in turn on the GPUs there are; on a CPU they share its threads."""
    shard: str = "1/1"
    """i/n: run the i-th of n parts of the cells, as a job of an array on a cluster does."""
    out: Path | None = None
    """Where cells and report go; without it runs/ablations/NAME."""


def ablate(options: Options) -> int:
    """All that a study comes to; return the exit code."""
    study = load_study(options.study)
    out = options.out or Path("runs/ablations") / options.study.stem
    every = cells(study, options.study, out)
    part = of_shard(every, options.shard)
    at_least(options, jobs=1)
    if options.dry_run:
        print(plan(part))
        return 0
    check_commands(study, options.study)
    for data in {cell.config.data: None for cell in part}:
        prepare(data.text, data.tokenizer, root=data.dir)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "report.lock")  # shards may end together
    with lock:
        write_json(out / STUDY, description(study, options.study, every))
    runner = Runner(part, [list(command) for command in study.measure], out, at_a_time=options.jobs)
    stopped_by = runner.run()
    if stopped_by is not None:
        print("stopped; the same command resumes from there", file=sys.stderr)
        return 128 + stopped_by
    if any(RunDir(cell.path).summary() for cell in every):
        with lock:
            print(f"\n{report([out], out)}\n\n{out}/report.html")
    for failure in runner.failures:
        print("failed: {cell}, {job}: {error} ({log})".format(**failure), file=sys.stderr)
    return 1 if runner.failures else 0


def of_shard(every: list[Cell], shard: str) -> list[Cell]:
    """The cells of part i of n, dealt out in turn. UserError where it is no such part."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard ({shard}) must be i/n with i from 1 to n, as 2/4")
    return every[int(match[1]) - 1 :: int(match[2])]


def description(study: Study, file: Path, every: list[Cell]) -> dict[str, Any]:
    """What a report must know of the study."""
    return {
        "name": file.stem,
        "question": study.question,
        "baseline": study.baseline,
        "cells": [{"path": cell.config.name, "variant": cell.variant, "seed": cell.seed} for cell in every],
    }


def main() -> None:
    raise SystemExit(ablate(tyro.cli(Options, prog="python -m scripts.ablate", description=__doc__)))


if __name__ == "__main__":
    exit_with_one_line(main)
