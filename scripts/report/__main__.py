"""Compare finished runs in a table, plots and an HTML page:  python -m scripts.report runs/demo/*"""

from pathlib import Path

import tyro

from cli.options import options_class, parse
from cli.program import exit_with_one_line
from scripts.report.collect import STUDY
from scripts.report.write import report


@options_class
class Options:
    """Write report.html, report.md, results.csv, timings.csv and plots for finished runs, and print the table.

    Runs that differ only in their seed are one variant, reported as a mean with a confidence interval.
    """

    runs: tyro.conf.Positional[list[Path]]
    """directories of finished runs, or of studies"""
    out: Path | None = None
    """output directory (default: the study's directory for a single study, otherwise runs/report)"""
    baseline: str | None = None
    """variant to compare the others with, paired by seed (default: the study's baseline)"""


def main() -> None:
    options = parse(Options, prog="python -m scripts.report", description=__doc__)
    a_study = len(options.runs) == 1 and (options.runs[0] / STUDY).is_file()
    out = options.out or (options.runs[0] if a_study else Path("runs/report"))
    print(report(options.runs, out, options.baseline))
    print(f"\n{out}/report.html")


if __name__ == "__main__":
    exit_with_one_line(main)
