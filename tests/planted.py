"""Finished runs that never ran, with the losses that a test plants in them."""

import json
import math
import random
from pathlib import Path

import pytest
from networks import SMALL

from artifacts.run_dir import RunDir
from configs.load import load
from model import cost
from scripts.report.collect import STUDY

FACTS = {"runtime": "device cpu", "commit": "c0ffee", "versions": {"torch": "2.13.0"}, "data": "d"}


def planted(
    root: Path, variant: str, seed: int, loss: float, *, stream: str = "5eed", evaluations=None, facts=None, **model
) -> dict:
    """A finished run that never ran, with this validation loss; returns its entry in study.json."""
    name = f"cells/{variant}-s{seed}"
    values = {"pattern": "5:1", "window": 5, "vocab_size": 257} | model
    config = load(None, {"name": name, "out_dir": str(root), "seed": seed, "model": SMALL | values})
    run = RunDir(config.path)
    run.begin(config, FACTS | (facts or {}))
    lines = [
        {
            "step": step,
            "tokens": step * 8192,
            "elapsed_s": step * (1 + seed / 7),
            "train_loss": loss + 2 / step,
            "tokens_per_s": 1000.0 + seed,
            "peak_memory_train_bytes": 3_000_000,
            "peak_memory_method": "cpu-live-tensors",
            "kernel": "tiles",
        }
        | ({"val_loss": loss + 1 / step} if step % 5 == 0 else {})
        for step in range(1, 11)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bits_per_byte": loss / 2}
    run.finish(
        lines[-1]
        | last
        | {"variant": name.split("/")[1], "layers": config.model.describe(), "best_val_loss": loss}
        | {"n_params": cost.n_params(config.model), "stream_hash": stream, "kv_cache_dtype": "bfloat16"}
        | {"kv_cache_bytes": {str(n): cost.cache_bytes(config.model, n) for n in (16, 32_768)}}
    )
    if evaluations:
        (run.path / "evaluations.json").write_text(json.dumps(evaluations))
    return {"path": name, "variant": variant, "seed": seed}


def study(root: Path, cells: list[dict], baseline: str = "full") -> Path:
    root.mkdir(exist_ok=True)
    content = {"name": "planted", "question": "What is found?", "baseline": baseline, "cells": cells}
    (root / STUDY).write_text(json.dumps(content))
    return root


NOISE = {seed: random.Random(seed).gauss(0, 0.05) for seed in range(1, 6)}  # of the data's order: shared in a pair
OWN = {seed: random.Random(99 + seed).gauss(0, 0.002) for seed in NOISE}  # of the variant


@pytest.fixture(scope="module")
def planted_study(tmp_path_factory) -> Path:
    """Five seeds of a baseline, a variant that is worse by 0.02 nats, and one that differs by noise alone."""
    root = tmp_path_factory.mktemp("study")
    cells = []
    for seed, shared in NOISE.items():
        cells.append(planted(root, "full", seed, 3 + shared, pattern="full", window=None))
        cells.append(planted(root, "narrow", seed, 3.02 + shared + OWN[seed], window=3))
        cells.append(planted(root, "wide", seed, 3 + shared + OWN[seed] - sum(OWN.values()) / 5, window=9))
    return study(root, cells)
