"""The one style of all plots: an empty figure, a legend, how a variant looks."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.atomic import write_atomically

MARKERS = "osD^vP*X"


def new_figure(x: str, ys: list[str]):
    """A figure with an empty plot for each of `ys`, side by side; matplotlib loads only when something is drawn."""
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
    """A whole picture or none: SVG or PDF where the name ends so, else PNG."""
    image, kind = io.BytesIO(), path.suffix.lstrip(".")
    figure.savefig(image, dpi=dpi, format=kind if kind in ("svg", "pdf") else "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())


def known(xs: Iterable, ys: Iterable) -> Iterator[tuple]:
    """The points that have a y, as axes.plot takes them: all their xs, then all their ys."""
    return zip(*((x, y) for x, y in zip(xs, ys, strict=True) if y is not None), strict=True)


def legend(figure, axes) -> None:
    """Inside where there are few names, else below, for which the figure grows."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 4:
        axes.legend(frameon=False)
        return
    columns = 2 if max(map(len, names)) > 24 else 3
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(names) // columns))
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=columns, fontsize="small")


def look(variants: list[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each variant, the same in every plot of a report."""
    return {v: {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]} for i, v in enumerate(variants)}
