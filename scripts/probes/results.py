"""Results of evaluations, saved in RUN/evaluations.json as one number for each column of a report."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from artifacts.files import read_json, write_json
from scripts.figure import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "evaluations.json"
STEP = "evaluated_step"  # column with the step of the evaluated checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A result that is a curve: saved as RUN/name.json, and as RUN/name.png if plotted."""

    name: str
    content: dict[str, Any]
    draw: Callable[[dict[str, Any]], "Figure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of one measure."""

    figures: dict[str, float]  # by column
    text: str  # the figures as a readable table
    curve: Curve | None = None


def column(name: str, *parts: str, **conditions: object) -> str:
    """A column name with its conditions: "perplexity[context=512,stride=64]"; conditions of None are left out."""
    shown = [*parts, *(f"{key}={value}" for key, value in conditions.items() if value is not None)]
    return f"{name}[{','.join(shown)}]" if shown else name


def keep(run: Path, step: int, found: list[Found], *, plot: bool) -> None:
    """Add the figures of the checkpoint at `step` to evaluations.json, and write the curves.

    Figures of another step are dropped, since a report must not mix two checkpoints of one run.
    """
    path = run / FILE
    with FileLock(f"{path}.lock"):  # two evaluations of one run may finish at the same time
        saved = _read(path)
        if saved.get(STEP, step) != step:
            print(f"note: {path} had results of step {saved[STEP]}; replacing them with step {step}", file=sys.stderr)
            saved = {}
        figures = {key: value for each in found for key, value in each.figures.items()}
        write_json(path, saved | {STEP: step} | figures)
        for curve in (each.curve for each in found if each.curve):
            write_json(run / f"{curve.name}.json", curve.content)
            if plot:
                save_figure(curve.draw(curve.content), run / f"{curve.name}.png")


def _read(path: Path) -> dict[str, float]:
    return read_json(path, advice="remove it and evaluate again") if path.is_file() else {}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns, the first aligned left and the others right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
