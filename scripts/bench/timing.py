"""Timing that a busy machine cannot fool much: candidates take turns, and what counts is the median of their ratios."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.device import Runtime
from model.errors import UserError


def refuse_unfused(kernel: str, what: str) -> None:
    """UserError where what should be a window's cost would be that of a mask over everything."""
    if "masked" in kernel:
        raise UserError(
            f"{what} ran as a mask ({kernel}): its figures would say nothing of a window; take kernel = auto"
        )


def take_turns(
    candidates: Mapping[str, Callable[[], object]], runtime: Runtime, *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after warm_up rounds that do not count."""
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
    """How many times faster: the median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """p of seconds ~ length ** p, fitted on log axes; nan for a single length."""
    if len(lengths) < 2:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(path)
