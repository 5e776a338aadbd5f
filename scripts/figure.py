"""The style of all plots: empty figures, legends, and the colour and marker of a variant."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.atomic import write_atomically

MARKERS = "osD^vP*X"


def new_figure(x: str, ys: list[str]):
    """A figure with empty plots side by side, one for each y label. Imports matplotlib only when called."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if len(ys) == 1 else 5 * len(ys), 4.2), layout="constrained")
    grid = figure.subplots(1, len(ys), squeeze=False)
    for axes, y in zip(grid[0], ys, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, list(grid[0])


def save_figure(figure, path: Path, *, dpi: int = 144) -> None:
    """Save a figure atomically: as SVG or PDF if the file has that suffix, otherwise as PNG."""
    image, kind = io.BytesIO(), path.suffix.lstrip(".")
    figure.savefig(image, dpi=dpi, format=kind if kind in ("svg", "pdf") else "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())


def known(xs: Iterable, ys: Iterable) -> Iterator[tuple]:
    """Drop points whose y is None; returns xs and ys as arguments for axes.plot."""
    return zip(*((x, y) for x, y in zip(xs, ys, strict=True) if y is not None), strict=True)


def legend(figure, axes) -> None:
    """Add a legend: inside the plot for up to four names, otherwise below it in a taller figure."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 4:
        axes.legend(frameon=False)
        return
    columns = 2 if max(map(len, names)) > 24 else 3
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(names) // columns))
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=columns, fontsize="small")


def look(variants: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each variant, consistent across the plots of a report."""
    return {v: {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]} for i, v in enumerate(variants)}
