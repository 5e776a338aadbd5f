"""Run an ablation study and write its report:  python -m scripts.ablate configs/ablations/window.toml

A cell is one variant trained with one seed. Re-running the command resumes a study that was interrupted or killed, and
retries cells that failed.
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
    """Train every variant of a study with every seed, each in its own process, measure the runs and write the report.

    A study is a TOML file with a base config, variants or a grid, and seeds: see docs/ablations.md.
    """

    study: tyro.conf.Positional[Path]
    """TOML file of the study"""
    dry_run: bool = False
    """list the cells with their estimated time and memory, without running anything"""
    jobs: Count = 1
    """number of cells to run at the same time, spread over the GPUs or sharing the CPU's threads"""
    shard: str = "1/1"
    """i/n: run only part i of n of the cells, for example as one task of a job array on a cluster"""
    out: Path | None = None
    """directory for the cells and the report (default: runs/ablations/NAME)"""


def ablate(options: Options) -> int:
    """Run a study and write its report; returns the exit code."""
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
    lock = FileLock(out / "report.lock")  # several shards may finish at the same time
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
    """Every n-th cell, starting at cell i, for shard "i/n". UserError if it is not of this form."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard ({shard}) must be i/n with i from 1 to n, such as 2/4")
    return every[int(match[1]) - 1 :: int(match[2])]


def description(study: Study, file: Path, every: list[Cell]) -> dict[str, Any]:
    """The contents of study.json, from which the report is written."""
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
