"""Runs of an earlier version (commit dc8fb6e; tests/data/compat) load, evaluate, generate and resume as they did."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import generate
import train
from artifacts.run_dir import RunDir
from configs.experiment import experiment_digest
from configs.load import load
from data.loader import eval_batches, stream_hash
from data.prepare import prepare
from model.device import resolve
from training.evaluate import evaluate

COMPAT = ROOT / "tests" / "data" / "compat"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder that the runs were made in, as the working directory."""
    for name in ("text.txt", "old.toml"):
        shutil.copy(COMPAT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_run_evaluates_as_then(folder):
    run = RunDir(COMPAT / "finished")
    config, summary = run.config(), run.summary()
    model, tokenizer = run.load(run.path)
    prepared = prepare(config.data.text, config.data.tokenizer, root=config.data.dir, progress=False)
    assert prepared.digest == run.facts()["data"]
    assert prepared.tokenizer.digest == tokenizer.digest
    val, T = prepared.split("val"), config.model.block_size
    assert stream_hash(val, T, config.train.eval_tokens) == summary["stream_hash"]
    batches = eval_batches(val, block_size=T, batch_size=8, max_tokens=config.train.eval_tokens)
    found = evaluate(model, batches, tokenizer.token_bytes(), resolve("cpu", "float32", "off"))
    assert found.loss == pytest.approx(2.78271, abs=1e-4)
    assert found.loss == pytest.approx(summary["val_loss"], abs=1e-4)


def test_a_finished_run_decodes_greedily_as_then(program):
    expected = json.loads((COMPAT / "finished-greedy.json").read_text())
    greedy = ("--prompt", expected["prompt"], "--temperature", 0, "--max-new-tokens", 80, "--dtype", "float32")
    ended = program(generate.main, COMPAT / "finished", *greedy, "--device", "cpu", "--json", name="generate.py")
    assert json.loads(ended.out)["tokens"] == expected["tokens"]


@pytest.mark.usefixtures("unmeasured")
def test_an_unfinished_run_resumes(folder, capsys):
    shutil.copytree(COMPAT / "unfinished", folder / "runs" / "old")
    before = RunDir(folder / "runs" / "old").metrics()
    result = train.run(load(Path("old.toml")))
    assert "resuming from step 109\n" in capsys.readouterr().out
    assert result.summary["step"] == 300
    assert result.summary["val_loss"] == pytest.approx(2.7827, abs=0.002)
    run = RunDir(result.path)
    assert run.metrics()[: len(before)] == before
    assert [line["step"] for line in run.metrics()] == list(range(10, 301, 10))
    config = (run.path / "config.json").read_text()
    assert '"activation_checkpointing"' in config
    assert '"recompute"' not in config


def test_a_study_finds_the_cells_of_an_earlier_version(folder):
    assert experiment_digest(load(Path("old.toml"))) == "4545a363"
