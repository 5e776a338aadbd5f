"""Plots of evaluations by position, context length, distance and sinks; None if no run has that evaluation."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from artifacts.files import read_json
from scripts.figure import legend, look, new_figure
from scripts.report.collect import Collected
from scripts.report.statistics import of_variant

POSITIONS = "loss_by_position.json"  # in a run's directory: {"position": [...], "loss": [...]}, from 1 on
LINES = ("-", "--", ":")
DISTANCES = "recall_by_distance.json"  # in a run's directory: {"distance": [...], "recall": [...], "chance": x}
CONTEXT = re.compile(r"perplexity\[context=(\d+)(?:,rope=(\w+))?\]")  # column names
STREAM = re.compile(r"stream_perplexity\[.*n_sink=(\d+).*\]")  # column names


def plot_position(c: Collected) -> Figure | None:
    """Loss by position in the context, averaged over seeds."""
    table = _loss_by_position(c)
    if table is None:
        return None
    figure, (axes,) = new_figure("position in the context", ["loss (nats per token)"])
    for variant, style in look(c.variants).items():
        if variant in table:
            mean = table[variant].mean(axis=1)
            axes.plot(mean.index, mean, ms=3, label=variant, **style)
    axes.set_xscale("log")
    legend(figure, axes)
    return figure


def plot_position_difference(c: Collected) -> Figure | None:
    """Difference of the loss by position from the baseline, paired by seed; the band spans the seeds."""
    table = _loss_by_position(c)
    if table is None or c.baseline is None or c.baseline not in table:
        return None
    figure, (axes,) = new_figure("position in the context", [f"loss, difference from {c.baseline}"])
    for variant, style in look(c.variants).items():
        if variant in table and variant != c.baseline:
            change = (table[variant] - table[c.baseline]).dropna(axis=1, how="all")
            axes.plot(change.index, change.mean(axis=1), ms=3, label=variant, **style)
            axes.fill_between(change.index, change.min(axis=1), change.max(axis=1), color=style["color"], alpha=0.1)
    axes.axhline(0, color="black", lw=1)
    axes.set_xscale("log")
    legend(figure, axes)
    return figure


def plot_recall(c: Collected) -> Figure | None:
    """Recall accuracy by distance; the band spans the seeds."""
    found = _curves(c, DISTANCES, "distance", "recall", "chance")
    if not found:
        return None
    table = pd.DataFrame({key: pd.Series(x["recall"], index=x["distance"], dtype=float) for key, x in found.items()})
    figure, (axes,) = new_figure("tokens between a key and its value", ["accuracy"])
    for variant, style in look(c.variants).items():
        if variant in table:
            own = table[variant]
            axes.plot(own.index, own.mean(axis=1), ms=4, label=variant, **style)
            axes.fill_between(own.index, own.min(axis=1), own.max(axis=1), color=style["color"], alpha=0.1)
    axes.axhline(next(iter(found.values()))["chance"], color="grey", lw=0.8, ls="--", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.02)
    legend(figure, axes)
    return figure


def plot_context(c: Collected) -> Figure | None:
    """Perplexity by context length, from the training context on; dashed and dotted lines have RoPE scaled.

    The bars span the seeds.
    """
    columns = {column: match for column in c.evaluations if (match := CONTEXT.fullmatch(column))}
    if not columns:
        return None
    figure, (axes,) = new_figure("context length (tokens)", ["perplexity"])
    stretches = dict.fromkeys(match[2] for match in columns.values())
    trained = {variant: c.of(variant)[0].config().model.block_size for variant in c.variants}
    for (variant, style), stretch in product(look(c.variants).items(), stretches):
        points = {int(match[1]): column for column, match in columns.items() if match[2] == stretch}
        points = {trained[variant]: "perplexity" if "perplexity" in c.evaluations else "val_perplexity"} | points
        own = c.results[c.results["variant"] == variant]
        seeds = pd.DataFrame({n: own[column] for n, column in sorted(points.items())}).dropna(axis=1, how="all")
        if stretch is not None and seeds.shape[1] < 2:
            continue
        dashes = {"ls": LINES[list(stretches).index(stretch) % len(LINES)]}
        label = variant if stretch is None else f"{variant}, RoPE scaling: {stretch}"
        mean = seeds.mean()
        spread = (mean - seeds.min(), seeds.max() - mean)
        axes.errorbar(seeds.columns, mean, spread, ms=4, capsize=2, label=label, **style | dashes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    legend(figure, axes)
    return figure


def plot_sinks(c: Collected) -> Figure | None:
    """Streaming perplexity through a window by number of attention sinks; dashed lines: recomputed without a cache."""
    columns = {column: int(match[1]) for column in c.evaluations if (match := STREAM.fullmatch(column))}
    recomputed = next((column for column in c.evaluations if column.startswith("recomputed_perplexity")), None)
    if len(set(columns.values())) < 2:
        return None
    figure, (axes,) = new_figure("attention sinks (first tokens that stay visible)", ["streaming perplexity"])
    for variant, style in look(c.variants).items():
        points = [(k, x) for column, k in columns.items() if (x := of_variant(c.results, column, variant))]
        if points:
            spread = [x.half or 0.0 for _, x in points]
            axes.errorbar(
                *zip(*((k, x.mean) for k, x in points), strict=True), spread, label=variant, capsize=3, **style
            )
        if recomputed and (x := of_variant(c.results, recomputed, variant)):
            axes.axhline(x.mean, color=style["color"], lw=1, ls="--")
    axes.set_xticks(sorted(set(columns.values())))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    legend(figure, axes)
    return figure


def _loss_by_position(c: Collected) -> pd.DataFrame | None:
    """Table with one row per position in the context and one column per (variant, seed)."""
    found = _curves(c, POSITIONS, "position", "loss")
    if not found:
        return None
    return pd.DataFrame({key: pd.Series(x["loss"], index=x["position"], dtype=float) for key, x in found.items()})


def _curves(c: Collected, name: str, *keys: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Contents of the file `name` of each run that has it, by (variant, seed). UserError if a key is missing."""
    files: dict[tuple[str, int], Path] = {(entry.variant, entry.seed): entry.run.path / name for entry in c.entries}
    return {key: read_json(file, keys=keys, advice="evaluate again") for key, file in files.items() if file.is_file()}
