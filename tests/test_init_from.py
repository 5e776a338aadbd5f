"""A run that begins with the weights of another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command_line, run_config

import train
from artifacts.run_dir import RunDir
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("unmeasured")

STILL = {"muon_lr": 1e-12, "adamw_lr": 1e-12, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def first(tmp_path_factory, text) -> RunDir:
    """The run whose weights are wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        config = run_config(tmp_path_factory.mktemp("first"), text, "first", optim={"warmup_steps": 2})
        return RunDir(train.run(config).path)


def weights(run: RunDir, which: str = "best") -> dict[str, torch.Tensor]:
    return run.load(run.path, which)[0].state_dict()


@pytest.mark.parametrize("which", ["run", "checkpoint"])
def test_a_run_begins_with_the_weights_of_another(tmp_path, text, first, which):
    source = first.path if which == "run" else first.checkpoint("latest").path
    config = run_config(tmp_path, text, init_from=str(source), optim=STILL, train={"max_steps": 1})
    summary = train.run(config).summary
    assert summary["val_loss"] == pytest.approx(first.summary()["best_val_loss"], abs=1e-5)
    expected = weights(first, "best" if which == "run" else "latest")
    for name, value in weights(RunDir(config.path)).items():
        assert torch.allclose(value, expected[name], atol=1e-9), name


def test_the_pattern_may_be_another_where_the_shapes_are_the_same(tmp_path, text, first):
    changes = {"model": {"pattern": "swa", "window": 3}, "optim": STILL, "train": {"max_steps": 1}}
    config = run_config(tmp_path, text, init_from=str(first.path), **changes)
    assert train.run(config).summary["layers"] == "swa*2"
    assert torch.allclose(weights(RunDir(config.path))["wte.weight"], weights(first)["wte.weight"], atol=1e-9)


def test_a_begun_run_goes_on_without_the_one_it_began_from(tmp_path, text, first):
    source = tmp_path / "source"
    shutil.copytree(first.path, source)
    train.run(run_config(tmp_path, text, init_from=str(source), train={"max_steps": 4}))
    shutil.rmtree(source)
    assert train.run(run_config(tmp_path, text, init_from=str(source), train={"max_steps": 6})).summary["step"] == 6


def refused(program, tmp_path: Path, text: Path, source: Path, *parts: str, **changes) -> None:
    line = command_line(tmp_path / "runs", text, init_from=str(source), **changes)
    program(train.main, *line, name="train.py").assert_refused(*parts)
    assert not (tmp_path / "runs").exists()


def test_other_shapes_are_refused_by_the_first_that_differs(tmp_path, text, first, program):
    said = " in the model; take the keys of model from"
    refused(program, tmp_path, text, first.path, "init_from: ", "is of another shape: h.0.", said, model={"n_embd": 32})


def test_another_vocabulary_is_refused(tmp_path, text, first, program):
    said = "was trained on the 257 tokens of byte, but this text uses the 56 of char"
    refused(program, tmp_path, text, first.path, f"init_from ({first.path}) {said}", data={"tokenizer": "char"})


def test_the_tokenizer_of_a_run_is_given_by_its_path(tmp_path, text, first):
    other = tmp_path / "other.txt"
    other.write_text("Something else, in the same tokens.\n" * 30, encoding="utf-8")
    changes = {"data": {"tokenizer": str(first.path), "dir": str(tmp_path / "data")}, "train": {"max_steps": 1}}
    config = run_config(tmp_path, other, init_from=str(first.path), **changes)
    path = train.run(config).path
    assert Tokenizer.load(path / "tokenizer.json").digest == Tokenizer.load(first.path / "tokenizer.json").digest
    assert train.run(config).step == 1  # it is finished, and found again
    (folder,) = (tmp_path / "data").glob("other-byte-*/")
    assert json.loads((folder / "meta.json").read_text())["tokenizer"] == "byte"


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path, text, first, program):
    said = f"tokenizer {tmp_path}/none: there is no {tmp_path}/none/tokenizer.json; give the directory of a run"
    refused(program, tmp_path, text, first.path, said, data={"tokenizer": f"{tmp_path}/none"})


def test_what_is_no_run_is_refused(tmp_path, text, program):
    (tmp_path / "empty").mkdir()
    refused(program, tmp_path, text, tmp_path / "empty", f"{tmp_path}/empty is not a run: it has no config.json")
