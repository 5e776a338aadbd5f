"""Runs to be evaluated, and their losses counted the slow way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_config, save_run
from torch import Tensor

import train
from artifacts.run_dir import RunDir
from model.gpt import GPT
from scripts import evaluate as script
from scripts.probes import subject
from scripts.probes.options import Options

LINE = "Die naïve Katze 猫 sieht überall 😀 und 😀....\n"  # 44 characters, 54 bytes


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, text) -> Path:
    """A run of a second on sentences with characters of one to four bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        changes = {"max_steps": 9, "eval_every": 3, "eval_tokens": 200}
        return train.run(run_config(tmp_path_factory.mktemp("runs"), text, train=changes)).path


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    """The same run with no evaluations."""
    (tmp_path / "run").mkdir()
    for part in trained_run.iterdir():
        if not part.name.startswith(("evaluations", "loss_", "recall_")):
            (tmp_path / "run" / part.name).symlink_to(part)
    return tmp_path / "run"


@pytest.fixture
def random_run(tmp_path) -> Path:
    """A byte-level network with random weights."""
    save_run(tmp_path / "random", pattern="swa full", window=5)
    return tmp_path / "random"


def figures(path: Path, **options) -> dict[str, float]:
    return script.evaluate(Options(run=path, **options))


def loaded(path: Path) -> tuple[GPT, Tensor]:
    """A run's best network and the first 201 tokens of its validation split."""
    run = RunDir(path)
    model, _ = run.load(path)
    tokens = subject._validation(run, run.config())
    return model.eval(), torch.from_numpy(tokens.read(0, 201).astype(np.int64))


def nats(model: GPT, ids: Tensor, start: int, t: int) -> float:
    """Of the token after t, from all tokens from start on."""
    with torch.no_grad():
        return -model(ids[None, start : t + 1])[0, -1].log_softmax(0)[ids[t + 1]].item()
