"""Write the table of the demo's finished runs into README.md:  python -m scripts.readme

It replaces everything between the markers <!-- demo --> and <!-- /demo -->. Run `python -m scripts.demo` first.
"""

from pathlib import Path

from artifacts.files import write_text
from cli.options import options_class, parse
from cli.program import exit_with_one_line
from model.errors import UserError
from scripts.demo import VARIANTS
from scripts.report.collect import Collected, collect
from scripts.report.tables import summary, table

START, END = "<!-- demo -->", "<!-- /demo -->"


@options_class
class Options:
    """Replace the demo's table in README.md with that of the finished runs, and name the machine they ran on."""

    runs: Path = Path("runs/demo")
    """directory of the demo's runs"""
    readme: Path = Path("README.md")
    """file with the markers"""


def update(options: Options) -> str:
    """Write the table between the markers; returns the new text between them."""
    collected = collect([options.runs / name for name in VARIANTS])
    content = f"{table(summary(collected))}\n\n{machine(collected)}"
    text = options.readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{options.readme} must have one {START} and, after it, one {END}")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    write_text(options.readme, f"{before}{START}\n{content}\n{END}{after}")
    return content


def machine(collected: Collected) -> str:
    """What the runs ran on, and how long training took. UserError if they did not run on the same machine."""
    facts = [entry.run.facts() for entry in collected.entries]
    where = {f"{fact['runtime']}; torch {fact['versions']['torch']}" for fact in facts}
    if len(where) > 1:
        raise UserError(f"these runs differ in machine or versions, run the demo again: {'; '.join(sorted(where))}")
    seconds = collected.timings["elapsed_s"].sum()
    return f"Measured on {where.pop()}. Training all {len(facts)} took {seconds:.0f} s."


def main() -> None:
    options = parse(Options, prog="python -m scripts.readme", description=__doc__)
    print(update(options))


if __name__ == "__main__":
    exit_with_one_line(main)
