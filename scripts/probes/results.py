"""What evaluations find, and where it is kept: a number for each column of a report in RUN/evaluations.json."""

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
STEP = "evaluated_step"  # the column that says which checkpoint the others are of


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What is more than a number: RUN/name.json, and RUN/name.png where it is drawn."""

    name: str
    content: dict[str, Any]
    draw: Callable[[dict[str, Any]], "Figure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one measure found."""

    figures: dict[str, float]  # by column
    text: str  # the same, to be read
    curve: Curve | None = None


def column(name: str, *parts: str, **conditions: object) -> str:
    """A column's name with what it was measured under: "perplexity[context=512,stride=64]"; None is left out."""
    said = [*parts, *(f"{key}={value}" for key, value in conditions.items() if value is not None)]
    return f"{name}[{','.join(said)}]" if said else name


def keep(run: Path, step: int, found: list[Found], *, plot: bool) -> None:
    """Add the figures of the checkpoint at `step` to the file, and write the curves.

    What the file has of another step is dropped: figures of two checkpoints are not one run's.
    """
    path = run / FILE
    with FileLock(f"{path}.lock"):  # two evaluations of one run may end at once
        kept = _read(path)
        if kept.get(STEP, step) != step:
            print(f"{path} was of step {kept[STEP]}, and is begun anew with step {step}", file=sys.stderr)
            kept = {}
        figures = {key: value for each in found for key, value in each.figures.items()}
        write_json(path, kept | {STEP: step} | figures)
        for curve in (each.curve for each in found if each.curve):
            write_json(run / f"{curve.name}.json", curve.content)
            if plot:
                save_figure(curve.draw(curve.content), run / f"{curve.name}.png")


def _read(path: Path) -> dict[str, float]:
    return read_json(path, advice="remove it and evaluate again") if path.is_file() else {}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
