"""A study: a base config, variants of it, seeds; and the cells that it comes to, one run each."""

import difflib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from configs.experiment import experiment_digest
from configs.load import build, load, merge, read_toml
from configs.schema import RunConfig
from model.errors import UserError
from model.section import Section

OURS = ("name", "out_dir", "seed")  # keys of a run that a study sets itself
Overrides = dict[str, Any]


class Study(Section):
    """What a study's TOML file may say. Its variants are those it names and those that its grid comes to."""

    question: str = Field("", description="what the study asks: stands at the head of its report")
    base: Path | None = Field(None, description="the config that all cells begin with; none: the defaults")
    baseline: str = Field(description="name of the variant that the others are compared with")
    seeds: tuple[int, ...] = Field((1, 2, 3), description="every variant runs with each: comparisons are in pairs")
    overrides: Overrides = Field({}, description="keys of a run, on top of the base in every cell")
    variants: dict[str, Overrides] = Field({}, description="by name: keys of a run, on top of these")
    grid: Overrides = Field({}, description="keys of a run with lists of values: each combination is a variant")
    measure: tuple[tuple[str, ...], ...] = Field(
        (("scripts.measure",),), description="run after training, each as `python -m COMMAND RUN ARGUMENTS`"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) must be some, each once")
        points = dict(_grid_points(self.grid))
        names = [*self.variants, *points]
        if not names:
            raise ValueError("it has no variants: give [variants.NAME] tables, or a [grid]")
        if both := self.variants.keys() & points.keys():
            raise ValueError(f"variant {both.pop()!r} is both named and in the grid")
        if self.baseline not in names:
            near = difflib.get_close_matches(self.baseline, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(names)}"
            raise ValueError(f"baseline ({self.baseline}) is no variant; {hint}")
        for where in (self.overrides, self.grid, *self.variants.values()):
            if own := set(OURS) & where.keys():
                raise ValueError(f"{own.pop()} is set by the study for each cell: leave it out of its variants")
        if () in self.measure:
            raise ValueError('measure has an empty command; one is a list as ["scripts.measure", "--rounds", "3"]')
        return self

    def all_variants(self) -> dict[str, Overrides]:
        """Overrides of the base by name: the named variants, then the grid's."""
        points = self.variants | dict(_grid_points(self.grid))
        current = RunConfig.with_current_names
        return {name: merge(current(self.overrides), current(point)) for name, point in points.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One variant with one seed: a run, in a directory named after what is in it."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def path(self) -> Path:
        return self.config.path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def load_study(file: Path) -> Study:
    """The study that a file describes. UserError, one line, for what is wrong in it."""
    return build(Study, read_toml(file), source=lambda key: f"{file}: ")


def cells(study: Study, file: Path, out: Path) -> list[Cell]:
    """All cells below `out`, seed after seed, so that a study cut short has whole pairs. UserError as above."""
    found: list[Cell] = []
    first_named: dict[str, str] = {}
    for seed, (variant, overrides) in itertools.product(study.seeds, study.all_variants().items()):
        ours = {"out_dir": str(out), "seed": seed, "name": "cells"}
        try:
            config = load(study.base, merge(overrides, ours | {"log": {"progress": False}}))
        except UserError as error:
            raise UserError(f"{file}: variant {variant!r}: {error}") from None
        digest = experiment_digest(config)
        if (other := first_named.setdefault(digest, variant)) != variant:
            raise UserError(f"{file}: variants {other!r} and {variant!r} are the same experiment: leave one out")
        name = f"cells/{_slug(variant)}-s{seed}-{digest}"
        found.append(Cell(variant=variant, seed=seed, config=config.model_copy(update={"name": name})))
    return found


def check_commands(study: Study, file: Path) -> None:
    """UserError for a command that is no module, before hours of training rather than after."""
    for module, *_ in study.measure:
        try:
            known = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            known = False
        if not known:
            raise UserError(f"{file}: measure: there is no module {module}; one is scripts.measure")


def _grid_points(grid: Overrides) -> Iterator[tuple[str, Overrides]]:
    """Names such as "pattern=5:1 window=64", with their overrides: all combinations of the grid's values."""
    axes = dict(_axes(grid))
    shown = [key for key, values in axes.items() if len(values) > 1] or list(axes)
    for values in itertools.product(*axes.values()) if axes else ():
        point = dict(zip(axes, values, strict=True))
        overrides: Overrides = {}
        for key, value in point.items():
            for part in reversed(key):
                value = {part: value}
            overrides = merge(overrides, value)
        yield " ".join(f"{key[-1]}={point[key]}" for key in shown), overrides


def _axes(grid: Overrides, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in grid.items():
        if isinstance(value, dict):
            yield from _axes(value, (*prefix, key))
        elif isinstance(value, list) and value:
            yield (*prefix, key), value
        else:
            raise ValueError(f"grid.{'.'.join((*prefix, key))} ({value!r}) must be a list of the values to try")


def _slug(variant: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", variant).strip("-") or "variant"
