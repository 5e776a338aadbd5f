"""A tiny run, trained as asked, and what it left."""

from pathlib import Path

import pytest
from conftest import run_config

import train
from configs.run_dir import RunDir
from configs.schema import RunConfig
from configs.trainer import Trainer
from model.evaluate import Evaluation


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
