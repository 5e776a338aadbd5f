"""Timing that is robust on a busy machine: candidates are timed in turn, and compared by the median of their ratios."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from artifacts.files import write_json
from cli.options import Count, options_class
from model.device import DType, Runtime
from model.errors import UserError


@options_class
class Measured:
    """Options shared by all benchmarks."""

    dtype: DType = "auto"
    """dtype of matmuls"""
    device: str = "auto"
    """device to run on: auto, cpu, cuda or mps"""
    rounds: Count = 3
    """timed rounds; the median is reported"""
    json: Path | None = None
    """file for the results as JSON"""


def refuse_unfused(kernel: str, what: str) -> None:
    """UserError if the cost of a window would be measured with a kernel that masks full attention."""
    if "masked" in kernel:
        raise UserError(f"{what} ran as a mask ({kernel}), which does not show the cost of a window; set kernel = auto")


def take_turns(
    candidates: Mapping[str, Callable[[], object]], runtime: Runtime, *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after `warm_up` untimed rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for n in tqdm(range(warm_up + rounds), desc=" against ".join(candidates), unit="round", leave=False, disable=None):
        for name, run in candidates.items():
            runtime.synchronize()
            start = time.perf_counter()
            run()
            runtime.synchronize()
            if n >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Speed-up: the median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent p in seconds ~ length ** p, fitted on log axes; nan for a single length."""
    if len(lengths) < 2:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def save(options: Measured, runtime: Runtime, **figures: Any) -> None:
    """Write options and results as JSON, if --json is given."""
    if (path := options.json) is not None:
        values = {key: value for key, value in asdict(options).items() if key not in ("json", "plot")}
        serializable = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"device": runtime.why, "options": serializable} | figures)
        print(path)
