"""One table, plots and a page of what runs cost and gave:  python -m scripts.report runs/demo/*"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli.program import exit_with_one_line
from scripts.report.collect import STUDY
from scripts.report.write import report


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write report.html, report.md, results.csv, timings.csv and plots about finished runs, and print the table.

    Runs that differ in their seed alone are one variant: their mean is given with its interval.
    """

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Directories of finished runs, or of studies."""
    out: Path | None = None
    """Where to write; without it the directory of the one study given, else runs/report."""
    baseline: str | None = None
    """The variant that others are compared with, pair by pair of seeds; without it the study's."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m scripts.report", description=__doc__)
    a_study = len(options.runs) == 1 and (options.runs[0] / STUDY).is_file()
    out = options.out or (options.runs[0] if a_study else Path("runs/report"))
    print(report(options.runs, out, options.baseline))
    print(f"\n{out}/report.html")


if __name__ == "__main__":
    exit_with_one_line(main)
