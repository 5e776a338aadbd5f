"""Evaluate a trained run:  python -m scripts.evaluate runs/shakespeare --by-position --plot

By default: loss, perplexity and bits per byte on the validation split, as training reported for the same checkpoint.
All results are also written to evaluations.json in the run's directory.
"""

import json

from cli.options import parse
from cli.program import exit_with_one_line
from scripts.probes.attention import to_first
from scripts.probes.extrapolation import extrapolate
from scripts.probes.options import Options
from scripts.probes.perplexity import perplexity
from scripts.probes.recall import recall
from scripts.probes.results import Found, keep
from scripts.probes.stream import stream
from scripts.probes.subject import open_subject


def evaluate(options: Options) -> dict[str, float]:
    """Run the requested measures, save and print the results, and return them by column."""
    requested = {
        stream: options.stream,
        extrapolate: options.extrapolate is not None,
        recall: options.recall,
        to_first: options.attention_to_first is not None,
    }
    measures = [perplexity] if options.by_position or not any(requested.values()) else []
    measures += [measure for measure, wanted in requested.items() if wanted]
    subject = open_subject(options.run, options.checkpoint, device=options.device, dtype=options.dtype)
    found: list[Found] = [measure(subject, options) for measure in measures]
    keep(subject.run.path, subject.step, found, plot=options.plot)
    figures = {key: value for each in found for key, value in each.figures.items()}
    if options.json:
        facts = {"run": str(subject.run.path), "step": subject.step, "runtime": subject.runtime.why}
        print(json.dumps(facts | {"figures": figures}, indent=2))
    else:
        head = f"{subject.run.path}, step {subject.step}: {subject.runtime.why}"
        print(head, *(each.text for each in found), sep="\n\n")
    return figures


def main() -> None:
    evaluate(parse(Options, prog="python -m scripts.evaluate", description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
