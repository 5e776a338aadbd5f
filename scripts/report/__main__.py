"""One table, plots and a page of what runs cost and gave:  python -m scripts.report runs/demo/*"""

from pathlib import Path

import tyro

from cli.options import options_class, parse
from cli.program import exit_with_one_line
from scripts.report.collect import STUDY
from scripts.report.write import report


@options_class
class Options:
    """Write report.html, report.md, results.csv, timings.csv and plots about finished runs, and print the table.

    Runs that differ only in their seed are one variant: its mean is reported with a confidence interval.
    """

    runs: tyro.conf.Positional[list[Path]]
    """directories of finished runs, or of studies"""
    out: Path | None = None
    """output directory (default: that of the one study given, else runs/report)"""
    baseline: str | None = None
    """variant that the others are compared with, paired by seed (default: the study's)"""


def main() -> None:
    options = parse(Options, prog="python -m scripts.report", description=__doc__)
    a_study = len(options.runs) == 1 and (options.runs[0] / STUDY).is_file()
    out = options.out or (options.runs[0] if a_study else Path("runs/report"))
    print(report(options.runs, out, options.baseline))
    print(f"\n{out}/report.html")


if __name__ == "__main__":
    exit_with_one_line(main)
