"""The tables of a report, as rows of {heading: text}."""

import os
import re
from pathlib import Path

from scripts.report.collect import Collected, Entry
from scripts.report.statistics import Estimate, difference, of_variant

Row = dict[str, str]  # heading -> text
PHASES = {
    "peak memory of a training step": "peak_memory_train_bytes",
    "reserved for it": "peak_memory_reserved_bytes",
    "of evaluation": "peak_memory_eval_bytes",
    "of generating": "peak_memory_generate_bytes",
}


def summary(c: Collected) -> list[Row]:
    """One row per variant: layers, quality and costs."""
    lengths = [key.removeprefix("kv_cache_bytes_") for key in c.results if key.startswith("kv_cache_bytes_")]
    rows = []
    for variant in c.variants:
        own = c.results[c.results["variant"] == variant]
        result = lambda column, v=variant: of_variant(c.results, column, v)
        row = {
            "variant": variant,
            "layers": own["layers"].iloc[0],
            "parameters": f"{own['n_params'].iloc[0] / 1e6:.2f} M",
            "validation perplexity": spread(result("val_perplexity")),
        }
        if c.baseline is not None:
            row[f"difference from {c.baseline}"] = compared(c, "val_perplexity", variant)
        row["bits per byte"] = spread(result("val_bits_per_byte"))
        for length in lengths:
            row[f"cache at {int(length):,}"] = megabytes(result(f"kv_cache_bytes_{length}"))
        row["peak memory of a training step"] = megabytes(result("peak_memory_train_bytes"))
        row["training tokens/s"] = spread(of_variant(c.timings, "tokens_per_s", variant))
        row["decode tokens/s"] = spread(of_variant(c.timings, "decode_tokens_per_s", variant))
        row["kernel"] = ", ".join(own["kernel"].unique())
        rows.append(row)
    return rows


def costs(c: Collected) -> list[Row]:
    """One row per variant: peak memory by phase, prefill speed, and how memory was measured."""
    rows = []
    for variant in c.variants:
        own = c.results[c.results["variant"] == variant]
        row = {"variant": variant}
        for phase, column in PHASES.items():
            row[phase] = megabytes(of_variant(c.results, column, variant))
        row["prefill tokens/s"] = spread(of_variant(c.timings, "prefill_tokens_per_s", variant))
        row["memory by"] = ", ".join(own["peak_memory_method"].dropna().unique())
        rows.append(row)
    return rows


def evaluations(c: Collected) -> list[Row]:
    """One row per measure, one column per variant; ≈ marks values not distinguishable from the baseline."""
    rows = []
    for column in c.evaluations:
        row = {"column": column}
        for variant in c.variants:
            change = None if c.baseline is None else difference(c.results, column, variant, c.baseline)
            same = variant != c.baseline and change is not None and change.holds_zero
            row[variant] = spread(of_variant(c.results, column, variant)) + (" ≈" if same else "")
        rows.append(row)
    return rows


def runs(c: Collected, out: Path) -> list[Row]:
    """One row per run; each number links to the run's directory."""
    rows = []
    for entry, (_, result), (_, timing) in zip(c.entries, c.results.iterrows(), c.timings.iterrows(), strict=True):
        figures = {
            "validation loss": f"{result['val_loss']:.4f}",
            "perplexity": f"{result['val_perplexity']:.2f}",
            "bits per byte": f"{result['val_bits_per_byte']:.4f}",
            "tokens": f"{result['tokens']:,}",
            "seconds": f"{timing['elapsed_s']:,.0f}",
        }
        links = {heading: link(text, entry, out) for heading, text in figures.items()}
        rows.append({"variant": escape(entry.variant), "seed": str(entry.seed)} | links)
    return rows


def linked(c: Collected, rows: list[Row], out: Path) -> list[Row]:
    """Rows of variants as Markdown, with an added column of links to their runs."""
    shown = []
    for row in rows:
        own = [link(str(entry.seed), entry, out) for entry in c.entries if entry.variant == row["variant"]]
        first, *rest = ((escape(key), escape(text)) for key, text in row.items())
        shown.append(dict([first, ("seeds", " ".join(own)), *rest]))
    return shown


def link(text: str, entry: Entry, out: Path) -> str:
    """A Markdown link to the run's directory, relative to a page in `out`."""
    target = os.path.relpath(entry.run.path, out).replace(os.sep, "/").replace(" ", "%20")
    return f"[{text}]({target}/)"


def spread(x: Estimate | None) -> str:
    """Format a mean ± half its interval, with as many digits as the interval supports."""
    if x is None:
        return "not measured"
    if not x.half:
        return f"{x.mean:,.3f}" if abs(x.mean) < 10 else f"{x.mean:,.1f}"
    digits = decimals(x.half)
    return f"{x.mean:,.{digits}f} ± {x.half:,.{digits}f}"


def compared(c: Collected, column: str, variant: str) -> str:
    """Format the difference from the baseline, with a remark if it is not distinguishable from zero."""
    assert c.baseline is not None, "called only with a baseline"
    if variant == c.baseline:
        return "baseline"
    x = difference(c.results, column, variant, c.baseline)
    if x is None:
        return "no common seed"
    if x.half is None:
        return f"{x.mean:+,.2f}, one seed: no interval"
    digits = decimals(x.half)
    shown = f"{x.mean:+,.{digits}f} ± {x.half:,.{digits}f}"
    return f"{shown}, not distinguishable" if x.holds_zero else shown


def decimals(half: float) -> int:
    """Number of decimals that show half an interval to two significant figures."""
    if not half:
        return 2
    return max(0, min(6, 1 - int(f"{half:e}".split("e")[1])))


def megabytes(x: Estimate | None) -> str:
    return "not measured" if x is None else f"{x.mean / 1e6:,.2f} MB"


def table(rows: list[Row]) -> str:
    """Format rows as a Markdown table with aligned columns."""
    lines = [list(rows[0]), *[list(row.values()) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    shown.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(shown)


def escape(text: str) -> str:
    """Escape characters that are special in Markdown."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
