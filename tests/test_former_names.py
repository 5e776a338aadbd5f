"""Former names of config keys and short names of dtypes are read everywhere; current, long names are written."""

from pathlib import Path

import pytest
import torch
from studies import cells_of

from configs.load import from_command_line, load
from configs.schema import RunConfig
from model.device import resolve
from model.errors import UserError
from scripts import kv_memory
from scripts.bench.timing import Measured
from scripts.convert import __main__ as convert
from training.progress import Progress


def line(*arguments: object) -> RunConfig:
    return from_command_line([str(x) for x in arguments], prog="train.py", description="")


@pytest.fixture
def old(tmp_path) -> Path:
    """A file with a former name."""
    file = tmp_path / "old.toml"
    file.write_text("[train]\nrecompute = true\n", encoding="utf-8")
    return file


def test_a_file_may_use_a_former_name(old):
    assert load(old).train.activation_checkpointing


@pytest.mark.parametrize("option", ["--train.recompute", "--train.activation-checkpointing"])
def test_the_command_line_may_use_a_former_name(option):
    assert line(option).train.activation_checkpointing


def test_an_option_may_be_turned_off_by_its_former_name(old):
    assert not line(old, "--train.no-recompute").train.activation_checkpointing


@pytest.mark.parametrize("option", ["--model.without=experts", "--model.omits=experts"])
def test_a_former_name_may_have_its_value_behind_an_equals_sign(option):
    assert line(option).model.omits == "experts"


@pytest.mark.parametrize("name", ["recompute", "activation_checkpointing"])
def test_an_override_by_either_name_replaces_the_former_name_in_a_file(old, name):
    assert not load(old, {"train": {name: False}}).train.activation_checkpointing


def test_both_names_in_one_file_are_refused_by_name(tmp_path):
    file = tmp_path / "both.toml"
    file.write_text("[train]\nrecompute = true\nactivation_checkpointing = true\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(file)
    said = "recompute is the former name of activation_checkpointing, and both are given: remove recompute"
    assert str(error.value) == f"{file}: train: {said}"


def test_help_shows_current_names_only(capsys):
    with pytest.raises(SystemExit):
        line("--help")
    said = capsys.readouterr().out
    assert "--train.activation-checkpointing" in said
    assert "--train.recompute" not in said


@pytest.mark.parametrize("name", ["recompute", "activation_checkpointing"])
def test_a_study_may_use_a_former_name(write_study, name):
    variants = {"wide": {"train": {name: False}}, "narrow": {"model": {"window": 3}}}
    cells = cells_of(write_study(train={"recompute": True}, variants=variants))
    assert [cell.config.train.activation_checkpointing for cell in cells[:2]] == [False, True]


def test_a_grid_over_a_former_name_keeps_the_names_of_its_variants(write_study):
    cells = cells_of(write_study(grid={"train": {"recompute": [True]}}))
    assert "recompute=True" in [cell.variant for cell in cells if cell.config.train.activation_checkpointing]


def test_progress_of_an_earlier_version_is_read():
    assert Progress.from_state({"step": 7, "parted": True}) == Progress(step=7, overfitting_reported=True)


@pytest.mark.parametrize(("short", "long"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_short_names_of_dtypes_become_long_ones(short, long):
    assert line("--dtype", short).dtype == load(None, {"dtype": short}).dtype == long


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_runtime_takes_short_names_of_dtypes(name, dtype):
    assert resolve("cpu", name, "off").dtype == dtype


def test_programs_take_short_names_of_dtypes_too():
    common = {"run": Path("runs/run"), "to": Path("exported")}
    assert kv_memory.Options(dtype="fp16").dtype == "float16"
    assert convert.Export(**common, dtype="bf16").dtype == "bfloat16"
    assert Measured(dtype="fp32").dtype == "float32"


@pytest.mark.parametrize("name", ["fp16", "float16"])
def test_float16_is_refused_for_training_on_one_line(name):
    with pytest.raises(UserError, match=r"^dtype \(float16\) is not for training: .*; take bfloat16 or float32$"):
        line("--dtype", name)
