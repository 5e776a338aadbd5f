"""Metrics of a run: lines of JSON that can be read at any moment and cut, mirrored to wandb without a login."""

import re
import sys

import pytest
from conftest import run_config

from artifacts.metrics import Metrics
from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from model.errors import UserError


def lines_of(run: RunDir) -> list[str]:
    return (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_metrics(run: RunDir, config: RunConfig, steps: range) -> None:
    metrics = Metrics(run.path, config)
    for step in steps:
        metrics.write({"step": step, "train_loss": step / 3, "mfu": None})
    metrics.close()


def test_metrics_are_lines_of_json_without_what_was_not_measured(begun, config):
    write_metrics(begun, config, range(1, 4))
    assert begun.metrics() == [{"step": step, "train_loss": step / 3} for step in range(1, 4)]


def test_a_line_can_be_read_as_soon_as_it_is_written(begun, config):
    metrics = Metrics(begun.path, config)
    metrics.write({"step": 1})
    assert begun.metrics() == [{"step": 1}]
    metrics.close()


def test_metrics_go_on_after_those_that_are_there(begun, config):
    write_metrics(begun, config, range(1, 3))
    write_metrics(begun, config, range(3, 5))
    assert [line["step"] for line in begun.metrics()] == [1, 2, 3, 4]


@pytest.mark.parametrize(("step", "left"), [(0, 0), (2, 2), (5, 5), (9, 5)])
def test_cutting_drops_what_came_after_a_step_and_nothing_else(begun, config, step, left):
    write_metrics(begun, config, range(1, 6))
    before = lines_of(begun)
    begun.truncate_metrics(step)
    assert lines_of(begun) == before[:left]


def test_cutting_drops_a_line_that_was_never_finished(begun, config):
    write_metrics(begun, config, range(1, 4))
    before = lines_of(begun)
    (begun.path / "metrics.jsonl").write_text("".join(before) + '{"step": 2, "trai')
    begun.truncate_metrics(9)
    assert lines_of(begun) == before


def test_cutting_where_there_are_no_metrics_makes_none(begun):
    begun.truncate_metrics(0)
    assert not (begun.path / "metrics.jsonl").exists()


@pytest.mark.parametrize("line", ["{", "[1]", "7", '{"loss": 2.0}', "\udcff"])
def test_a_damaged_line_of_metrics_is_named_and_nothing_is_cut(begun, line):
    file = begun.path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', encoding="utf-8", errors="surrogateescape")
    before = file.read_bytes()
    for read in (begun.metrics, lambda: begun.truncate_metrics(2)):
        with pytest.raises(UserError, match=re.escape("metrics.jsonl: line 2 is damaged: take it out")):
            read()
    assert file.read_bytes() == before


# wandb mirrors the lines, and never asks for a login.


@pytest.fixture
def mirrored(tmp_path, text) -> RunConfig:
    return run_config(tmp_path / "runs", text, "mine", log={"wandb": True, "wandb_project": "attention"})


def test_wandb_gets_the_lines_as_they_are(begun, mirrored, wandb):
    write_metrics(begun, mirrored, range(1, 4))
    assert wandb.logged == [(line, line["step"]) for line in begun.metrics()]
    assert wandb.finished


def test_wandb_is_offline_without_a_key_and_writes_into_the_run(begun, mirrored, wandb):
    Metrics(begun.path, mirrored).close()
    assert wandb.started["mode"] == "offline"
    assert (wandb.started["project"], wandb.started["name"]) == ("attention", "mine")
    assert wandb.started["dir"] == begun.path
    assert wandb.started["config"] == mirrored.model_dump(mode="json")


@pytest.mark.parametrize("where", ["environment", "settings"])
def test_wandb_is_online_with_a_key(begun, mirrored, wandb, monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "key")
    else:
        wandb.api.api_key = "key"
    Metrics(begun.path, mirrored).close()
    assert wandb.started["mode"] is None


def test_wandb_keeps_a_mode_that_was_asked_for(begun, mirrored, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Metrics(begun.path, mirrored).close()
    assert wandb.started["mode"] is None


def test_wandb_is_not_even_imported_unless_asked(begun, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_metrics(begun, config, range(1, 3))
    assert len(begun.metrics()) == 2
