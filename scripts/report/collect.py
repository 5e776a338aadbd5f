"""Collect run directories into two tables with one row per run: reproducible results, and timings."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from artifacts.files import read_json
from artifacts.run_dir import RunDir
from configs.experiment import settings
from model.errors import UserError
from scripts.probes.results import FILE as EVALUATIONS
from scripts.probes.results import STEP as EVALUATED_STEP

STUDY = "study.json"  # in the directory of a study: question, baseline and cells
MEASURED = "measured.json"  # in a run's directory, like evaluations.json: {column: number}
CLOCKS = re.compile(r"(_per_s|_s|_ms|_seconds)$|^mfu$|^peak_memory_process_bytes$")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run with its variant and seed."""

    run: RunDir
    variant: str
    seed: int


@dataclass(kw_only=True)
class Collected:
    """Finished runs; `results` and `timings` have one row per entry, in the same order."""

    entries: list[Entry]
    results: pd.DataFrame
    timings: pd.DataFrame
    varying: list[str]  # config keys other than the seed that differ between runs; columns of results
    evaluations: list[str]  # columns that come from evaluations
    title: str = "Report"
    question: str = ""
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[str]:
        return list(self.results["variant"].unique())

    def of(self, variant: str) -> list[RunDir]:
        """The variant's runs, by seed."""
        return [entry.run for entry in self.entries if entry.variant == variant]


def collect(paths: list[Path], baseline: str | None = None) -> Collected:
    """Collect runs, and the finished cells of studies, from their directories.

    UserError if a run is not finished, or if the losses are not comparable.
    """
    studies = [path for path in paths if (path / STUDY).is_file()]
    single = [path for path in paths if path not in studies and (path.is_dir() or not path.exists())]
    entries = _entries([RunDir.of(path) for path in single])
    keys = ("name", "question", "baseline", "cells")
    plans = [read_json(study / STUDY, keys=keys, advice="run the study again") for study in studies]
    notes = []
    for study, plan in zip(studies, plans, strict=True):
        cells = [Entry(run=RunDir(study / c["path"]), variant=c["variant"], seed=c["seed"]) for c in plan["cells"]]
        finished = [cell for cell in cells if cell.run.summary() is not None]
        missing = [f"{cell.variant} seed {cell.seed}" for cell in cells if cell not in finished]
        if missing:
            notes.append(f"{len(missing)} of {len(cells)} cells are not finished: {', '.join(missing)}.")
        entries += finished
    if not entries:
        raise UserError(f"there are no finished runs in {', '.join(map(str, paths))} yet")
    results, timings = pd.DataFrame([_results(e) for e in entries]), pd.DataFrame([_timings(e) for e in entries])
    configs = pd.json_normalize([settings(entry.run.config()) for entry in entries]).drop(columns="seed")
    varying = [key for key in configs if configs[key].map(str).nunique() > 1]
    results = pd.concat([results.iloc[:, :2], configs[varying], results.iloc[:, 2:]], axis=1)
    _check(results, experiments=configs.map(str).agg(tuple, axis=1))
    if baseline not in (None, *results["variant"]):
        raise UserError(f"--baseline ({baseline}) must be one of {', '.join(results['variant'].unique())}")
    if baseline is None and plans:
        baseline = plans[0]["baseline"]
        if baseline not in set(results["variant"]):
            notes.append(f"No cell of the baseline, {baseline}, is finished, so no differences are shown.")
            baseline = None
    return Collected(
        entries=entries,
        results=results,
        timings=timings,
        varying=varying,
        evaluations=_evaluations(entries, results),
        title=" and ".join(plan["name"] for plan in plans) or "Report",
        question=" ".join(plan["question"] for plan in plans),
        baseline=baseline,
        notes=notes + _marks(entries, results),
    )


def _entries(runs: list[RunDir]) -> list[Entry]:
    """Group runs that differ only in their seed into variants, named by the common prefix of the run names."""
    found: dict[str, list[RunDir]] = {}
    for run in runs:
        if run.summary() is None:
            raise UserError(f"{run.path} is not finished: run its training command again first")
        found.setdefault(json.dumps(run.config().experiment() | {"seed": None}), []).append(run)
    entries = []
    for group in found.values():
        names = [run.path.name for run in group]
        shared = names[0][: next((i for i, x in enumerate(zip(*names, strict=False)) if len(set(x)) > 1), None)]
        variant = names[0] if len(names) == 1 else shared.rstrip("-_. ") or names[0]
        entries += [Entry(run=run, variant=variant, seed=run.config().seed) for run in group]
    return entries


def _results(entry: Entry) -> dict[str, Any]:
    """The reproducible results of a run."""
    summary = _summary(entry.run)
    cache = {f"kv_cache_bytes_{n}": x for n, x in summary.pop("kv_cache_bytes").items()}
    own = {"variant": entry.variant, "seed": entry.seed}
    tokens = {"tokens_per_step": entry.run.config().train.global_batch_tokens}
    found = summary | tokens | cache | _measured(entry.run)
    return own | {key: value for key, value in found.items() if key not in own and not CLOCKS.search(key)}


def _timings(entry: Entry) -> dict[str, Any]:
    """Measurements of a run that depend on time or on the machine, and the machine."""
    speeds = [x["tokens_per_s"] for x in entry.run.metrics() if "tokens_per_s" in x]
    found = {key: x for key, x in (_summary(entry.run) | _measured(entry.run)).items() if CLOCKS.search(key)}
    found["tokens_per_s"] = float(pd.Series(speeds, dtype=float).median())  # over all lines
    facts = entry.run.facts()
    where = {key: facts.get(key) for key in ("matmul_flops_per_s", "runtime", "commit")}
    return {"variant": entry.variant, "seed": entry.seed} | found | where


def _summary(run: RunDir) -> dict[str, Any]:
    """summary.json, with peak memory from the metrics if the run was resumed after it was measured."""
    lines = run.metrics()
    peaks = {key: x for line in lines for key, x in line.items() if key.startswith("peak_memory")}
    return peaks | (run.summary() or {})


def _measured(run: RunDir) -> dict[str, Any]:
    return _json(run, MEASURED) | _json(run, EVALUATIONS)


def _json(run: RunDir, name: str) -> dict[str, Any]:
    file = run.path / name
    return read_json(file, advice="remove it and measure again") if file.is_file() else {}


def _evaluations(entries: list[Entry], results: pd.DataFrame) -> list[str]:
    found = dict.fromkeys(key for entry in entries for key in _json(entry.run, EVALUATIONS))
    return [key for key in found if key in results and key != EVALUATED_STEP]


def _check(results: pd.DataFrame, experiments: pd.Series) -> None:
    """UserError if the rows are not comparable."""
    if (n := results["stream_hash"].nunique()) > 1:
        raise UserError(f"these runs have {n} different evaluation streams: their losses are not comparable")
    twice = results[results.duplicated(["variant", "seed"])]
    if len(twice):
        variant, seed = twice.iloc[0][["variant", "seed"]]
        raise UserError(f"two runs are {variant} with seed {seed}: leave one out")
    for variant, kinds in experiments.groupby(results["variant"], sort=False):
        if kinds.nunique() > 1:
            raise UserError(f"different experiments have the same name {variant}: report them separately")


def _marks(entries: list[Entry], results: pd.DataFrame) -> list[str]:
    """Notes on differences between runs that limit their comparison, one sentence each."""
    facts = [entry.run.facts() for entry in entries]
    differing = {
        "Tokens per step": (list(results["tokens_per_step"]), "equal tokens do not mean equal steps"),
        "Machines": ([fact["runtime"] for fact in facts], "do not compare their times"),
        "Commits": ([fact["commit"] for fact in facts], "the code may have changed between them"),
        "Versions of torch": ([fact["versions"]["torch"] for fact in facts], "results may differ for that reason"),
    }
    found = []
    if results["kernel"].nunique() > 1:
        found.append("Kernels differ (see the table): times and training memory depend on the kernel too.")
    for name, (values, consequence) in differing.items():
        if len(kinds := Counter(values)) > 1:
            each = "; ".join(f"{value}: {n} run{'s' if n > 1 else ''}" for value, n in kinds.items())
            found.append(f"{name} differ ({each}): {consequence}.")
    late = results[results["best_val_loss"] < results["val_loss"]]
    if len(late):
        which = ", ".join(f"{variant} seed {seed}" for variant, seed in zip(late["variant"], late["seed"], strict=True))
        found.append(
            f"The best checkpoint of {which} is not the last one: generation and evaluations are measured on the best "
            "checkpoint, but the losses in the table are those of the last."
        )
    return found
