"""What a run leaves behind, and what a second start of it may change."""

import json
import re
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_run
from pydantic import BaseModel

from artifacts.environment import environment
from artifacts.run_dir import MAY_CHANGE, RunDir
from configs.schema import RunConfig
from model.device import resolve
from model.errors import UserError
from training.distributed import DistributedContext
from training.optim import Optimizers

# The directory.


def test_opening_a_directory_writes_nothing(tmp_path):
    run = RunDir(tmp_path / "a")
    assert not run.exists()
    assert run.latest() is None
    assert run.summary() is None
    assert list(tmp_path.iterdir()) == []


def test_a_begun_run_keeps_its_config_and_facts(begun, config):
    assert begun.exists()
    assert begun.config() == config
    assert {key: value for key, value in begun.facts().items() if key != "config"} == {
        "data": "da7a",
        "commit": "c0ffee",
    }


def test_a_run_can_be_begun_where_a_start_was_cut_short(config):
    for leftover in ("checkpoints", "config.json.tmp"):
        path = config.path / leftover
        path.mkdir(parents=True) if "." not in leftover else path.write_text("{")
    RunDir(config.path).begin(config, {"data": "da7a"})
    assert RunDir(config.path).config() == config


def test_a_directory_of_something_else_is_left_alone(config):
    config.path.mkdir(parents=True)
    (config.path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError) as error:
        RunDir(config.path).begin(config, {"data": "da7a"})
    assert str(error.value) == f"{config.path} exists and is not a run: give another --name"
    assert [file.name for file in config.path.iterdir()] == ["thesis.tex"]


def test_beginning_again_takes_back_the_summary(begun, config):
    begun.finish({"val_loss": 1.0})
    assert begun.summary() == {"val_loss": 1.0}
    begun.begin(config, {"data": "da7a"})
    assert begun.summary() is None


@pytest.mark.parametrize("path", ["", "mine/checkpoints", "mine/config.json", "nowhere"])
def test_another_path_is_no_run(begun, path):
    path = begun.path.parent / path
    with pytest.raises(UserError) as error:
        RunDir.of(path)
    assert str(error.value) == f"{path} is not a run: it has no config.json"


@pytest.mark.parametrize("content", ["", "{", '{"config"', "[1]"])
def test_a_damaged_config_is_said(begun, content):
    (begun.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{begun.path / 'config.json'} is damaged (")):
        begun.config()


@pytest.mark.parametrize("content", ["{}", '{"config": 1, "data": "x"}', '{"config": {}}'])
def test_a_config_that_lacks_its_parts_is_said(begun, content):
    (begun.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged: it does not say config and data"):
        begun.config()


def test_a_damaged_summary_is_said_with_what_to_do(begun):
    (begun.path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged \(.*\): remove it and repeat the training command"):
        begun.summary()


def test_a_config_of_another_version_names_the_key(begun):
    facts = begun.facts()
    facts["config"]["model"]["n_heads"] = facts["config"]["model"].pop("n_head")
    (begun.path / "config.json").write_text(json.dumps(facts))
    message = f"{begun.path}/config.json: model.n_heads is unknown; did you mean n_head?"
    with pytest.raises(UserError, match=re.escape(message)):
        begun.config()


def test_the_environment_says_versions_device_and_commit():
    facts = environment(resolve("cpu", "float32", "off"))
    assert list(facts["versions"]) == ["python", "torch", "tiktoken"]
    assert facts["versions"]["torch"] == torch.__version__
    assert "cpu" in facts["runtime"]
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["commit"])


# What may change on resume.


def leaf_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in values.items()
        for key in (leaf_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


def changed(config: RunConfig, key: str) -> RunConfig:
    """The config with one value another, whether it could be built or not."""
    section, _, name = key.rpartition(".")
    record = getattr(config, section) if section else config
    was = getattr(record, name)
    match was:
        case bool():
            now: Any = not was
        case int() | float():
            now = was + 1
        case tuple():
            now = (0.5, 0.5)
        case Path():
            now = was / "elsewhere"
        case None:
            now = 77
        case _:
            now = f"{was}-other"
    record = BaseModel.model_copy(record, update={name: now})
    return config.model_copy(update={section: record}) if section else record


def value_at(config: RunConfig, key: str) -> Any:
    return reduce(dict.__getitem__, key.split("."), config.model_dump(mode="json"))


def may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


KEYS = leaf_keys(RunConfig().model_dump(mode="json"))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_the_experiment_cannot_change_and_others_can(begun, config, key):
    warnings.simplefilter("ignore", UserWarning)  # of values that no config could have
    other = changed(config, key)
    if may_change(key):
        begun.check_same(other, "da7a")
        return
    with pytest.raises(UserError) as error:
        begun.check_same(other, "da7a")
    was, now = value_at(config, key), value_at(other, key)
    assert str(error.value) == (
        f"{begun.path} was begun with {key} = {was!r}, now it is {now!r}: give another --name, "
        f"or remove the directory to begin again"
    )


@pytest.mark.parametrize(
    "key", ["name", "out_dir", "device", "dtype", "compile", "log.wandb", "log.progress", "train.max_steps", "data.dir"]
)
def test_length_place_device_and_logging_may_change(key):
    assert may_change(key)


@pytest.mark.parametrize(
    "key", ["seed", "model.window", "model.dropout", "data.text", "train.global_batch_tokens", "optim.warmup_steps"]
)
def test_what_changes_the_result_may_not(key):
    assert key in KEYS
    assert not may_change(key)


def test_every_key_that_may_change_exists():
    assert [name for name in MAY_CHANGE if not any(k == name or k.startswith(f"{name}.") for k in KEYS)] == []


def test_the_same_config_is_the_same(begun, config):
    begun.check_same(config, "da7a")


def test_a_run_that_was_begun_before_a_key_was_known_goes_on(begun, config):
    facts = json.loads((begun.path / "config.json").read_text())
    del facts["config"]["model"]["init_std"]
    (begun.path / "config.json").write_text(json.dumps(facts))
    begun.check_same(config, "da7a")
    other = config.model_copy(update={"model": config.model.model_copy(update={"init_std": None})})
    with pytest.raises(UserError, match=r"was begun with model.init_std = 0.02, now it is None"):
        begun.check_same(other, "da7a")


def test_other_data_is_refused_with_both_hashes(begun, config):
    with pytest.raises(UserError) as error:
        begun.check_same(config, "0ther")
    assert str(error.value) == (
        f"{begun.path} was begun on other data (hash da7a, now 0ther): "
        f"give another --name, or remove the directory to begin again"
    )


# Alone.


def test_a_run_is_trained_by_one_process_at_a_time(begun):
    said = f"{begun.path} is trained by another process now: wait, or give another --name"
    with begun.locked():
        with pytest.raises(UserError) as error, RunDir(begun.path).locked():
            pass
        assert str(error.value) == said
    with RunDir(begun.path).locked():
        pass


class Second(DistributedContext):
    """The second of two processes, the first of which found the run locked or not."""

    def all_reduce_max(self, value: int = 0) -> int:
        return max(value, self.locked)


def test_all_processes_learn_that_the_run_is_locked(begun):
    second = Second(rank=1, size=2)
    object.__setattr__(second, "locked", 1)
    with pytest.raises(UserError, match="is trained by another process now"), begun.locked(second):
        pass
    object.__setattr__(second, "locked", 0)
    with begun.locked(), begun.locked(second):  # the first holds the lock for both
        pass


def test_a_run_that_was_not_begun_leaves_nothing(config):
    with RunDir(config.path).locked():
        assert config.path.exists()
    assert not config.path.exists()


def test_a_directory_of_something_else_keeps_what_it_has(config):
    config.path.mkdir(parents=True)
    (config.path / "thesis.tex").write_text("mine")
    with RunDir(config.path).locked():
        pass
    assert [file.name for file in config.path.iterdir()] == ["thesis.tex"]


def test_networks_come_back_by_best_latest_or_path(tmp_path):
    best = save_run(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    last = save_run(tmp_path / "other", seed=1)
    run.save(last, Optimizers([torch.optim.SGD(last.parameters())]), {"step": 9}, best=False)
    for network, path, which in (
        (best, run.path, "best"),
        (last, run.path, "latest"),
        (best, run.checkpoints / "step_00000003", "latest"),
    ):
        loaded, tokenizer = run.load(path, which)
        assert torch.equal(loaded.lm_head.weight, network.lm_head.weight)
        assert tokenizer.name == "byte"


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    save_run(tmp_path / "run")
    save_run(tmp_path / "other", n_embd=22)
    path = tmp_path / "run" / "checkpoints" / "step_00000003"
    path.rename(path.with_name("away"))
    (tmp_path / "other" / "checkpoints" / "step_00000003").rename(path)
    with pytest.raises(UserError, match=rf"{path} is of another shape: .* is \(.*22.*\) in the checkpoint and \(.*20"):
        RunDir(tmp_path / "run").load(tmp_path / "run")
