"""One table and a set of plots of what runs cost and gave:  python -m scripts.report runs/demo/*"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from configs.program import exit_with_one_line
from configs.run_dir import RunDir
from model import cost
from model.errors import UserError
from scripts.measure import FILE

CONTEXTS = [2**n for n in range(8, 18)]  # 256 to 131 072 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write report.md, loss.png and cache.png about finished runs, and print the table."""

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Directories of finished runs."""
    out: Path = Path("runs/report")
    """Where to write."""


def row(run: RunDir) -> dict[str, Any]:
    """One run's figures under the table's headings; what was not measured is None."""
    summary = run.summary()
    if summary is None:
        raise UserError(f"{run.path} is not finished: repeat its training command first")
    path = run.path / FILE
    measured = json.loads(path.read_text()) if path.exists() else {}
    T = run.config().model.block_size
    return {
        "variant": summary["variant"],
        "layers": summary["layers"],
        "parameters": summary["n_params"],
        "validation perplexity": summary["val_perplexity"],
        "bits per byte": summary["val_bits_per_byte"],
        "peak memory of a training step": summary.get("peak_memory_train_bytes"),
        f"cache at {T:,}": summary["kv_cache_bytes"][str(T)],
        "cache at 32,768": summary["kv_cache_bytes"]["32768"],
        "training tokens/s": summary.get("tokens_per_s"),
        "decode tokens/s": measured.get("decode_tokens_per_s"),
        "kernel": summary["kernel"],
    }


def cell(heading: str, value: Any) -> str:
    """A figure as text, with its unit where the heading does not say it."""
    if value is None:
        return "not measured"
    if "cache" in heading or "memory" in heading:
        return f"{value / 1e6:,.2f} MB"
    if heading == "parameters":
        return f"{value / 1e6:.2f} M"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"
    return str(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, aligned to be read as it is."""
    table = [list(rows[0]), *[[cell(heading, value) for heading, value in row.items()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def plot_loss(runs: list[RunDir], path: Path) -> None:
    """Training loss against tokens, smoothed by the interval of logging, and validation loss as points."""
    figure, (axes,) = new_figure("tokens", ["loss (nats per token)"])
    for run in runs:
        lines = run.metrics()
        (curve,) = axes.plot([x["tokens"] for x in lines], [x["train_loss"] for x in lines], lw=1, alpha=0.6)
        points = [x for x in lines if "val_loss" in x]
        axes.plot(
            [x["tokens"] for x in points],
            [x["val_loss"] for x in points],
            "o-",
            color=curve.get_color(),
            label=f"{run.path.name} (validation)",
        )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


def plot_cache(runs: list[RunDir], path: Path) -> None:
    """Bytes of the bfloat16 cache against tokens in context, by the arithmetic that tests hold equal to allocation."""
    figure, (axes,) = new_figure("context in tokens", ["KV cache in MB (bfloat16)"])
    for run in runs:
        model = run.config().model
        axes.loglog(CONTEXTS, [cost.cache_bytes(model, n) / 1e6 for n in CONTEXTS], "o-", ms=3, label=run.path.name)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


def new_figure(x: str, ys: list[str]):
    """A figure with an empty plot for each of `ys`, side by side; matplotlib loads only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 7 if len(ys) == 1 else 5 * len(ys)
    figure, grid = plt.subplots(1, len(ys), figsize=(width, 4.2), layout="constrained", squeeze=False)
    for axes, y in zip(grid[0], ys, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, list(grid[0])


def report(paths: list[Path], out: Path) -> str:
    """Write report.md and the plots into `out`; return the table. UserError where runs cannot stand in one table."""
    runs = [RunDir.of(path) for path in paths if path.is_dir() or not path.exists()]  # runs/demo/* has the plots too
    rows = [row(run) for run in runs]
    streams = {(run.summary() or {})["stream_hash"] for run in runs}
    if len(streams) > 1:
        raise UserError(f"{len(streams)} evaluation streams among these runs: their losses cannot share a table")
    table = markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    plot_loss(runs, out / "loss.png")
    plot_cache(runs, out / "cache.png")
    body = f"{table}\n\n![loss against tokens](loss.png)\n\n![cache against context](cache.png)\n"
    (out / "report.md").write_text(body, encoding="utf-8")
    return table


def main() -> None:
    options = tyro.cli(Options, prog="python -m scripts.report", description=__doc__)
    print(report(options.runs, options.out))
    print(f"\n{options.out}/report.md, loss.png, cache.png")


if __name__ == "__main__":
    exit_with_one_line(main)
