"""A report as Markdown, and as a single HTML file with embedded images."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from scripts.report.collect import Collected
from scripts.report.tables import costs, escape, evaluations, linked, runs, summary, table

FIGURE = re.compile(r"<p>(<img [^>]*>)</p>\n<p>(.*?)</p>")  # as Markdown renders an image and its caption

STYLE = """
:root { color-scheme: light; --line: #d9dee5; --soft: #f5f7fa; --text: #1c2430; --link: #1d5fa8; }
body { margin: 0 auto; max-width: 92rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; color: var(--text);
       background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1, h2 { line-height: 1.2; font-weight: 650; text-wrap: balance; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
a { color: var(--link); text-underline-offset: .15em; }
code { background: var(--soft); padding: .1em .35em; border-radius: 4px; font-size: .88em; overflow-wrap: anywhere; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { white-space: normal; vertical-align: bottom; min-width: 4rem; background: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--soft); font-weight: 600; }
p, li { max-width: 75ch; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; align-self: end; }
img { display: block; width: 100%; max-width: 44rem; height: auto; }
figcaption { font-size: .9rem; color: #4d5a6b; }
"""


def markdown(c: Collected, plots: dict[str, str], out: Path) -> str:
    """The whole report; `plots` are captions by file name."""
    parts = [f"# {c.title}", c.question, table(linked(c, summary(c), out)), *reading(c)]
    if c.notes:
        parts += ["## To note", "\n".join(f"- {escape(note)}" for note in c.notes)]
    parts += ["## Plots", *(f"![{caption}]({name})\n\n{caption}" for name, caption in plots.items())]
    if c.evaluations:
        rows = [{escape(key): escape(text) for key, text in row.items()} for row in evaluations(c)]
        same = f" ≈: not distinguishable from {escape(c.baseline)}." if c.baseline is not None else ""
        parts += ["## Evaluations", table(rows), f"Measured on the best checkpoint of each run.{same}"]
    parts += ["## Memory by phase", table(linked(c, costs(c), out)), "## Runs", table(runs(c, out))]
    parts += ["[results.csv](results.csv) has all columns, [timings.csv](timings.csv) has the timings."]
    return "\n\n".join(part for part in parts if part) + "\n"


def reading(c: Collected) -> list[str]:
    """Sentences that explain how to read the results."""
    n_seeds = c.results.groupby("variant")["seed"].nunique()
    several = n_seeds.max() > 1
    found = [
        f"Every run is validated on the same stream of tokens ({c.results['stream_hash'].iloc[0]}), in contexts of "
        "block_size tokens without overlap. Tokens per second depend on the machine and its load."
    ]
    if several:
        seeds = " to ".join(map(str, sorted({n_seeds.min(), n_seeds.max()})))
        found.append(f"{seeds} seeds per variant: mean ± half the width of the 95 % confidence interval (Student's t).")
    else:
        found.append("One seed per variant: there are no confidence intervals, so differences may be noise.")
    if several and c.baseline is not None:
        found.append(
            f"Differences from {escape(c.baseline)} are paired by seed, which fixes the order of the data. If the "
            "interval contains zero, the two variants are not distinguishable with these seeds. There is no correction "
            "for multiple comparisons: among twenty variants without a true difference, one is expected to miss zero."
        )
    return found


def page(text: str, title: str, folder: Path) -> str:
    """Render Markdown as a self-contained HTML file: images from `folder` are embedded, and there are no scripts."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(FIGURE, r"<figure>\1<figcaption>\2</figcaption></figure>", body)
    body = re.sub(r"(?:<figure>.*</figure>\n)+", r'<div class="plots">\g<0></div>\n', body)
    body = re.sub(r'src="([^":]+\.png)"', lambda match: f'src="{_inline(folder / match[1])}"', body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'  # keeps browsers from requesting one
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}{icon}\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}</body>\n</html>\n"
    )


def _inline(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
