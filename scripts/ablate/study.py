"""A study: a base config, variants and seeds; each combination of variant and seed is a cell, trained as one run."""

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

OURS = ("name", "out_dir", "seed")  # config keys that a study sets itself
Overrides = dict[str, Any]


class Study(Section):
    """The keys of a study's TOML file. Variants are named in `variants`, or generated from `grid`."""

    question: str = Field("", description="question that the study answers; printed at the top of the report")
    base: Path | None = Field(None, description="config file that all cells start from; none: the defaults")
    baseline: str = Field(description="name of the variant that the others are compared with")
    seeds: tuple[int, ...] = Field(
        (1, 2, 3), description="each variant is trained with each seed; differences are paired"
    )
    overrides: Overrides = Field({}, description="config keys to override in every cell, on top of the base")
    variants: dict[str, Overrides] = Field({}, description="name -> config keys to override, on top of overrides")
    grid: Overrides = Field({}, description="config keys with lists of values; each combination is a variant")
    measure: tuple[tuple[str, ...], ...] = Field(
        (("scripts.measure",),), description="commands to run after training, as `python -m COMMAND RUN ARGUMENTS`"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) must be a list of different numbers, at least one")
        points = dict(_grid_points(self.grid))
        names = [*self.variants, *points]
        if not names:
            raise ValueError("the study has no variants: add [variants.NAME] tables or a [grid]")
        if both := self.variants.keys() & points.keys():
            raise ValueError(f"variant {both.pop()!r} is both in [variants] and in the [grid]: remove one")
        if self.baseline not in names:
            near = difflib.get_close_matches(self.baseline, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(names)}"
            raise ValueError(f"baseline ({self.baseline}) is not a variant; {hint}")
        for where in (self.overrides, self.grid, *self.variants.values()):
            if own := set(OURS) & where.keys():
                raise ValueError(f"{own.pop()} is set by the study for each cell: remove it from the overrides")
        if () in self.measure:
            raise ValueError('measure has an empty command; a command is a list: ["scripts.measure", "--rounds", "3"]')
        return self

    def all_variants(self) -> dict[str, Overrides]:
        """Name -> overrides on top of the base: first the named variants, then the grid."""
        points = self.variants | dict(_grid_points(self.grid))
        current = RunConfig.with_current_names
        return {name: merge(current(self.overrides), current(point)) for name, point in points.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One variant with one seed, trained as one run; the directory's name has a hash of its config."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def path(self) -> Path:
        return self.config.path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def load_study(file: Path) -> Study:
    """Read a study. UserError, one line, for an invalid file."""
    return build(Study, read_toml(file), source=lambda key: f"{file}: ")


def cells(study: Study, file: Path, out: Path) -> list[Cell]:
    """All cells below `out`, ordered by seed, so that an interrupted study has complete pairs. UserError if invalid."""
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
            raise UserError(f"{file}: variants {other!r} and {variant!r} are the same experiment: remove one")
        name = f"cells/{_slug(variant)}-s{seed}-{digest}"
        found.append(Cell(variant=variant, seed=seed, config=config.model_copy(update={"name": name})))
    return found


def check_commands(study: Study, file: Path) -> None:
    """UserError for a measuring command that is not a module, before hours of training instead of after."""
    for module, *_ in study.measure:
        try:
            known = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            known = False
        if not known:
            raise UserError(f"{file}: measure: there is no module {module}; for example, use scripts.measure")


def _grid_points(grid: Overrides) -> Iterator[tuple[str, Overrides]]:
    """All combinations of the grid's values, as names such as "pattern=5:1 window=64" with their overrides."""
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
