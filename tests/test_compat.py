"""Runs of an earlier version (commit dc8fb6e; tests/data/compat) load, evaluate, generate and resume as they did."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import generate
import train
from artifacts.run_dir import RunDir
from configs.experiment import experiment, experiment_digest
from configs.load import load
from configs.schema import DataConfig, OptimConfig, RunConfig, TrainConfig
from data.loader import eval_batches, stream_hash
from data.prepare import prepare
from model.config import ModelConfig
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


@pytest.mark.slow
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
    assert experiment_digest(RunDir(COMPAT / "finished").config()) == "4545a363"
    assert experiment_digest(RunDir(COMPAT / "unfinished").config()) == "4545a363"


class MoreModel(ModelConfig):
    added: int = 3


class MoreData(DataConfig):
    added: str | None = None


class MoreOptim(OptimConfig):
    added: float = 0.5


class MoreTrain(TrainConfig):
    added: tuple[int, ...] = (1, 2)


class MoreConfig(RunConfig):
    """A later version, in which every section has a key more."""

    added: bool = False
    model: MoreModel = MoreModel()
    data: MoreData = MoreData()
    optim: MoreOptim = MoreOptim()
    train: MoreTrain = MoreTrain()


@pytest.mark.parametrize("section", [None, "model", "data", "optim", "train"])
def test_added_keys_are_part_of_an_experiment_only_where_they_are_not_at_their_default(section):
    values = json.loads((COMPAT / "finished" / "config.json").read_text())["config"]
    assert experiment_digest(MoreConfig(**values)) == "4545a363"
    given = {None: True, "model": 4, "data": "x", "optim": 0.25, "train": [1]}[section]
    changed = values | ({"added": given} if section is None else {section: values[section] | {"added": given}})
    assert experiment_digest(MoreConfig(**changed)) != "4545a363"


@pytest.mark.parametrize(
    ("section", "former", "name", "value"),
    [("model", "without", "omits", "experts"), ("train", "recompute", "activation_checkpointing", True)],
)
def test_renamed_keys_are_read_and_keep_the_experiment(section, former, name, value):
    old, new = (RunConfig(**{section: {key: value}}) for key in (former, name))
    assert old == new
    assert experiment_digest(old) == experiment_digest(new) != experiment_digest(RunConfig())
    assert experiment(old)[section][former] == value
    assert name in old.model_dump()[section]
    with pytest.raises(ValueError, match=f"{former} is the former name of {name}, and both are given"):
        RunConfig(**{section: {former: value, name: value}})
