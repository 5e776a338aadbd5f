"""Run a study, and report what it came to:  python -m scripts.ablate configs/ablations/window.toml

The same command repeated goes on where it was stopped or killed, and runs again what failed.
"""

import re
import sys
from pathlib import Path
from typing import Any

import tyro
from filelock import FileLock

from artifacts.files import write_json
from artifacts.run_dir import RunDir
from cli.options import Count, options_class, parse
from cli.program import exit_with_one_line
from data.prepare import prepare
from model.errors import UserError
from scripts.ablate.plan import plan
from scripts.ablate.runner import Runner
from scripts.ablate.study import Cell, Study, cells, check_commands, load_study
from scripts.report.collect import STUDY
from scripts.report.write import report


@options_class
class Options:
    """Train every variant of a study with every seed, each in its own process; measure each; write the report.

    A study is a TOML file with a base config, variants or a grid, and seeds: see docs/ablations.md.
    """

    study: tyro.conf.Positional[Path]
    """the study's TOML file"""
    dry_run: bool = False
    """list the cells with an estimate of their time and memory, and run nothing"""
    jobs: Count = 1
    """cells that run at the same time: distributed over the GPUs, or sharing the threads of a CPU"""
    shard: str = "1/1"
    """i/n: run only the i-th of n parts of the cells, for one task of a job array on a cluster"""
    out: Path | None = None
    """directory of cells and report (default: runs/ablations/NAME)"""


def ablate(options: Options) -> int:
    """All that a study comes to; return the exit code."""
    study = load_study(options.study)
    out = options.out or Path("runs/ablations") / options.study.stem
    every = cells(study, options.study, out)
    part = of_shard(every, options.shard)
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
    raise SystemExit(ablate(parse(Options, prog="python -m scripts.ablate", description=__doc__)))


if __name__ == "__main__":
    exit_with_one_line(main)
