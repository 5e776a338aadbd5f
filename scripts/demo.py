"""Train three small GPTs that differ only in their attention, and compare them:  python -m scripts.demo"""

import subprocess
import sys
import time
from pathlib import Path

from cli.options import Count, options_class, parse
from cli.program import exit_with_one_line, stop_signals
from scripts.report.write import report

CONFIG = "configs/demo.toml"
VARIANTS = {
    "mha": [],
    "gqa": ["--model.n_kv_head", "2"],
    "gqa-swa": ["--model.n_kv_head", "2", "--model.pattern", "5:1", "--model.window", "64"],
}
SAMPLE = ("--prompt", "Return the", "--max-new-tokens", "150", "--temperature", "0.7", "--top-p", "0.9")


@options_class
class Options:
    """Train MHA, GQA, and GQA with 5:1 sliding windows; then print samples and a table, and write plots."""

    steps: Count | None = None
    """optimizer steps of each run (default: as in configs/demo.toml)"""
    out: Path = Path("runs/demo")
    """directory for the runs and the report; an interrupted demo resumes from it"""


def demo(options: Options) -> None:
    """Train, measure, report and sample: the whole of `make demo`."""
    start = time.perf_counter()
    steps = [] if options.steps is None else ["--train.max_steps", str(options.steps)]
    runs = [options.out / name for name in VARIANTS]
    for name, run in zip(VARIANTS, runs, strict=True):
        where = ["--out_dir", str(run.parent), "--name", name]
        _python("train.py", CONFIG, *where, *VARIANTS[name], *steps)
    for run in runs:
        _python("-m", "scripts.measure", str(run), quiet=True)
    table = report(runs, options.out)
    for run in runs:
        print(f"\n--- {run.name} ---", flush=True)
        _python("generate.py", str(run), *SAMPLE)
    print(f"\n{table}\n\n{options.out}/report.html, report.md and plots; in {time.perf_counter() - start:.0f} s")


def _python(*arguments: str, quiet: bool = False) -> None:
    """Run a Python program to its end. On a signal, terminate it and wait, as training saves before it exits."""
    with stop_signals() as stopped:
        program = subprocess.Popen((sys.executable, *arguments), stdout=subprocess.DEVNULL if quiet else None)
        while program.poll() is None and not stopped:
            time.sleep(0.05)
        if stopped:
            program.terminate()
            program.wait()
            raise SystemExit(128 + stopped[0])
    if program.returncode:
        raise SystemExit(program.returncode if program.returncode > 0 else 128 - program.returncode)


def main() -> None:
    demo(parse(Options, prog="python -m scripts.demo", description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
