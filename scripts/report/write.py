"""Write a report: CSV tables, plots, Markdown and HTML."""

import os
from pathlib import Path

import pandas as pd

from artifacts.files import write_text
from scripts.figure import save_figure
from scripts.report.collect import Collected, collect
from scripts.report.page import markdown, page
from scripts.report.plots import PLOTS
from scripts.report.tables import summary, table


def report(paths: list[Path], out: Path, baseline: str | None = None) -> str:
    """Write a report into `out` and return its summary table. UserError if the runs are not comparable."""
    collected = collect(paths, baseline)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results", "timings"):
        rows: pd.DataFrame = getattr(collected, name).copy()
        rows.insert(2, "run", [os.path.relpath(entry.run.path, out) for entry in collected.entries])
        write_text(out / f"{name}.csv", rows.to_csv(index=False))
    text = markdown(collected, draw(collected, out), out)
    write_text(out / "report.md", text)
    write_text(out / "report.html", page(text, collected.title, out))
    return table(summary(collected))


def draw(collected: Collected, out: Path) -> dict[str, str]:
    """Save every plot that the runs have data for; returns captions by file name."""
    captions = {}
    for name, (caption, make) in PLOTS.items():
        figure = make(collected)
        if figure is None:
            (out / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report
            continue
        save_figure(figure, out / f"{name}.png", dpi=160)
        captions[f"{name}.png"] = caption
    return captions
