"""A tiny run, trained as asked, and what it left."""

from pathlib import Path

import pytest
from conftest import run_config

import train
from configs.run_dir import RunDir
from configs.schema import RunConfig


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
