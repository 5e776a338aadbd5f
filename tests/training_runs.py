"""A tiny run, trained as asked, and what it left."""

from pathlib import Path

import pytest
from conftest import run_config

import train
from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from training.evaluate import Evaluation
from training.trainer import Trainer


def losses(run: RunDir) -> list[float]:
    return [line["train_loss"] for line in run.metrics()]


def content(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def trained(tmp_path, text):
    """Train a tiny run; what is asked for differs from conftest.RUN."""

    def start(name: str = "run", **changes) -> RunDir:
        return RunDir(train.run(run_config(tmp_path / "runs", text, name, **changes)).path)

    return start


@pytest.fixture
def config(tmp_path, text) -> RunConfig:
    return run_config(tmp_path / "runs", text, "mine")


@pytest.fixture
def begun(config) -> RunDir:
    run = RunDir(config.path)
    run.begin(config, {"data": "da7a", "commit": "c0ffee"})
    return run


def evaluations_find(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Evaluations of the whole stream find these; those that only measure memory find nothing."""
    found = iter(losses)

    def evaluate(_: Trainer, at_most: int | None = None) -> Evaluation | None:
        if at_most is not None:
            return None
        return Evaluation(loss=next(found), perplexity=1.0, bits_per_byte=1.0, n_tokens=1)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)


SAME = (
    "step",
    "tokens",
    "train_loss",
    "lr",
    "grad_norm",
    "skipped_steps",
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "kernel",
)
SUMMARY = (*SAME, "variant", "layers", "n_params", "best_val_loss", "kv_cache_bytes", "kv_cache_dtype", "stream_hash")


def outcome(path: Path) -> dict[str, object]:
    """All of a finished run that does not depend on time or place."""
    run = RunDir(path)
    summary = run.summary()
    assert summary is not None, "it is not finished"
    return {
        "metrics": [{key: line[key] for key in SAME if key in line} for line in run.metrics()],
        "summary": {key: summary[key] for key in SUMMARY if key != "variant"},
        "steps": {which: run.checkpoint(which).step for which in ("best", "latest")},
        "files": {
            f"{which}/{name}": (run.checkpoint(which).path / name).read_bytes()
            for which in ("best", "latest")
            for name in ("model.safetensors", "optimizer.safetensors")
        },
    }


def assert_same(one: Path, other: Path) -> None:
    one, other = outcome(one), outcome(other)
    assert one["metrics"] == other["metrics"]
    assert one == other
