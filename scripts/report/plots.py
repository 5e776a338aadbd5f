"""The plots of a report, as functions of the collected runs; None if the runs lack the data for a plot."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from model import cost
from scripts.figure import legend, look, new_figure
from scripts.report.collect import Collected
from scripts.report.curves import plot_context, plot_position, plot_position_difference, plot_recall, plot_sinks
from scripts.report.statistics import Estimate, difference, of_variant

CONTEXTS = [2**n for n in range(8, 18)]  # 256 to 131 072 tokens
CACHE = "kv_cache_bytes_"  # prefix of a column name, followed by the context length
PERPLEXITY = "validation perplexity"


def plot_difference(c: Collected) -> Figure | None:
    """Difference of each variant from the baseline with its confidence interval; hollow if that contains zero."""
    if c.baseline is None:
        return None
    found = {v: difference(c.results, "val_perplexity", v, c.baseline) for v in c.variants if v != c.baseline}
    shown = {variant: x for variant, x in found.items() if x is not None}
    if not shown:
        return None
    figure, (axes,) = new_figure(f"{PERPLEXITY}, difference from {c.baseline} (lower is better)", [""])
    figure.set_figheight(1.2 + 0.36 * len(shown))
    styles = look(c.variants)
    for y, (variant, x) in enumerate(shown.items()):
        color = styles[variant]["color"]
        fill = color if x.holds_zero is False else "white"
        axes.errorbar(x.mean, y, xerr=x.half, fmt="o", color=color, mfc=fill, capsize=3)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    return figure


def plot_window(c: Collected) -> Figure | None:
    """Perplexity by window, one line per layer pattern (or other varying keys); variants without windows as bands."""
    sliding = c.results[c.results["layers"].str.contains("swa")]
    if "model.window" not in c.varying or sliding["model.window"].nunique() < 2:
        return None
    figure, (axes,) = new_figure("window (tokens)", [PERPLEXITY])
    others = [key for key in c.varying if key != "model.window" and sliding[key].map(str).nunique() > 1]
    name_line = lambda row: ", ".join(f"{key.split('.')[-1]}={row[key]}" for key in others) or row["layers"]
    lines = sliding.apply(name_line, axis=1)
    for name, rows in sliding.groupby(lines, sort=False):
        rows = rows.drop_duplicates("variant").sort_values("model.window")
        points = [_perplexity(c, variant) for variant in rows["variant"]]
        spread = [point.half or 0.0 for point in points]
        means = [point.mean for point in points]
        axes.errorbar(rows["model.window"], means, spread if any(spread) else None, fmt="o-", capsize=3, label=name)
    for i, variant in enumerate(v for v in c.variants if v not in set(sliding["variant"])):
        x = _perplexity(c, variant)
        axes.axhline(x.mean, color="black", lw=1, ls=("--", ":", "-.")[i % 3], label=variant)
        axes.axhspan(x.low, x.high, color="black", alpha=0.06, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted(sliding["model.window"].unique()), [f"{tick:g}" for tick in ticks])
    legend(figure, axes)
    return figure


def plot_pareto_cache(c: Collected) -> Figure | None:
    """Perplexity against the size of the KV cache at the longest context length in the results."""
    longest = max(int(key.removeprefix(CACHE)) for key in c.results if key.startswith(CACHE))
    label = f"KV cache at {longest:,} tokens (MB, bfloat16)"
    return _pareto(c, {v: _scaled(of_variant(c.results, f"{CACHE}{longest}", v), 1e-6) for v in c.variants}, label)


def plot_pareto_speed(c: Collected) -> Figure | None:
    speeds = {v: of_variant(c.timings, "decode_tokens_per_s", v) for v in c.variants}
    return _pareto(c, speeds, "decode (tokens/s)", more_is_better=True)


def plot_loss(c: Collected) -> Figure:
    figure, (axes,) = new_figure("training tokens", ["loss (nats per token)"])
    for variant, style in look(c.variants).items():
        lines = _metrics(c, variant)
        means = lines.groupby("tokens")["train_loss"].mean()
        points = lines.dropna(subset="val_loss").groupby("tokens")["val_loss"].agg(["mean", "min", "max"])
        axes.plot(means.index, means, lw=0.8, alpha=0.4, color=style["color"])
        axes.plot(points.index, points["mean"], ms=4, label=variant, **style)
        axes.fill_between(points.index, points["min"], points["max"], color=style["color"], alpha=0.15, lw=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _leave_out_the_start(axes, c)
    legend(figure, axes)
    return figure


def plot_time(c: Collected) -> Figure:
    figure, (axes,) = new_figure("time of training and evaluation (s)", ["validation loss (nats per token)"])
    for variant, style in look(c.variants).items():
        points = _metrics(c, variant).dropna(subset="val_loss").groupby("tokens")[["elapsed_s", "val_loss"]].mean()
        axes.plot(points["elapsed_s"], points["val_loss"], ms=4, label=variant, **style)
    legend(figure, axes)
    return figure


def plot_cache(c: Collected) -> Figure:
    figure, (axes,) = new_figure("context length (tokens)", ["KV cache (MB, bfloat16)"])
    for variant, style in look(c.variants).items():
        model = c.of(variant)[0].config().model
        axes.loglog(CONTEXTS, [cost.cache_bytes(model, n) / 1e6 for n in CONTEXTS], ms=4, label=variant, **style)
    legend(figure, axes)
    return figure


def _pareto(c: Collected, costs: dict[str, Estimate | None], label: str, more_is_better: bool = False) -> Figure | None:
    """Perplexity against a cost or a speed; a line joins the Pareto-optimal variants."""
    points = {variant: (x, _perplexity(c, variant)) for variant, x in costs.items() if x is not None}
    if len(points) < 2:
        return None
    figure, (axes,) = new_figure(label, [PERPLEXITY])
    styles = look(c.variants)
    for variant, (x, y) in points.items():
        axes.errorbar(x.mean, y.mean, y.half, x.half, ls="", label=variant, capsize=2, **styles[variant])
    front = _front([(x.mean, y.mean) for x, y in points.values()], more_is_better)
    axes.plot(*zip(*front, strict=True), color="grey", lw=1, zorder=0)
    means = [x.mean for x, _ in points.values()]
    if max(means) > 10 * min(means):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
    legend(figure, axes)
    return figure


def _front(points: list[tuple[float, float]], more_is_better: bool) -> list[tuple[float, float]]:
    """The Pareto front: from the best x on, each point with a lower y than all before."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0] if more_is_better else point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _metrics(c: Collected, variant: str) -> pd.DataFrame:
    """The metrics of all seeds of a variant."""
    return pd.concat(pd.DataFrame(run.metrics()) for run in c.of(variant))


def _leave_out_the_start(axes: Axes, c: Collected) -> None:
    """Limit the y axis to the range of the validation losses, since the losses of the first steps are far higher."""
    losses = pd.concat(_metrics(c, variant)["val_loss"] for variant in c.variants)
    low, high = losses.min(), losses.max()
    axes.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.2 * (high - low) + 0.01)


def _perplexity(c: Collected, variant: str) -> Estimate:
    found = of_variant(c.results, "val_perplexity", variant)
    assert found is not None, "every finished run has a perplexity"
    return found


def _scaled(x: Estimate | None, unit: float) -> Estimate | None:
    return x and Estimate(mean=x.mean * unit, half=x.half and x.half * unit, n=x.n)


PLOTS: dict[str, tuple[str, Callable[[Collected], Figure | None]]] = {
    "difference": (
        "Difference from the baseline with its 95 % confidence interval; hollow: not distinguishable.",
        plot_difference,
    ),
    "window": ("Perplexity by window, one line per layer pattern.", plot_window),
    "pareto-cache": ("Perplexity against the size of the KV cache; the line is the Pareto front.", plot_pareto_cache),
    "pareto-speed": ("Perplexity against decoding speed; the line is the Pareto front.", plot_pareto_speed),
    "loss": ("Validation loss (points; the band spans the seeds) and training loss (thin) by tokens.", plot_loss),
    "time": ("Validation loss by time; depends on the machine and its kernels.", plot_time),
    "position": ("Loss by position in the context.", plot_position),
    "position-difference": ("Loss by position in the context, difference from the baseline.", plot_position_difference),
    "context": ("Perplexity beyond the training context; broken lines: RoPE scaled.", plot_context),
    "sinks": ("Streaming perplexity through a window by number of attention sinks; dashed: recomputed.", plot_sinks),
    "recall": ("Recall accuracy by distance from a key to its value; the band spans the seeds.", plot_recall),
    "cache": ("Size of the KV cache by context length, computed; tests check it against allocation.", plot_cache),
}
