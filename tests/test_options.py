"""Options: declared once, read from the command line, refused in one line that names them as they are typed."""

import shlex
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from pydantic import Field, model_validator

import generate
from cli.options import Count, Natural, as_arguments, options_class, parse, run_subcommand, validated
from model.errors import UserError
from scripts import coordinates, demo, kv_memory, masks, measure, memory
from scripts.ablate import __main__ as ablate
from scripts.bench import attention, decode, loss, train
from scripts.convert import __main__ as convert
from scripts.probes import options as evaluate
from scripts.report import __main__ as report


@options_class
class Group:
    """A part of them."""

    n_rows: Count | None = None
    """rows of the table"""


@options_class
class Options:
    """A program's own."""

    path: tyro.conf.Positional[Path]
    """where it is"""
    widths: Annotated[tuple[Natural, ...], Field(min_length=1)] = (3, 4)
    """several widths"""
    part: Annotated[float, Field(gt=0, le=1)] = 1.0
    """a part of the whole"""
    name: Annotated[str, Field(min_length=1)] = "x"
    """how it is called"""
    group: Group = Group()

    @model_validator(mode="after")
    def _together(self):
        if self.name == "wide" and len(self.widths) > 2:
            raise ValueError("--name wide takes two --widths at most")
        return self


@options_class
class Inherited(Options):
    """With one more."""

    more: int = 0
    """more of them"""


def read(*line: str, options=Options):
    return parse(options, prog="program", description=None, argv=["here", *line])


def test_what_is_not_given_has_its_default():
    assert read() == Options(path=Path("here"))


def test_options_of_a_group_are_typed_without_its_name():
    found = read("--n-rows", "7", "--widths", "0", "5")
    assert (found.group.n_rows, found.widths) == (7, (0, 5))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--n-rows 0", "--n-rows (0) must be at least 1"),
        ("--widths 3 -1", "--widths (-1) must be at least 0"),
        ("--widths", "--widths () must have at least 1 values"),
        ("--part 0", "--part (0.0) must be above 0"),
        ("--part 1.5", "--part (1.5) must be at most 1"),
        ("--name=", "--name ('') must not be empty"),
        ("--name wide --widths 1 2 3", "--name wide takes two --widths at most"),
    ],
)
@pytest.mark.parametrize("options", [Options, Inherited])
def test_a_value_out_of_its_range_is_refused_in_one_line(line, said, options):
    with pytest.raises(UserError) as error:
        read(*line.split(), options=options)
    assert str(error.value) == said


def test_a_subcommand_has_options_of_its_own(capsys):
    called = []
    commands = {"one": (called.append, Options), "two": (called.append, Group)}
    run_subcommand(commands, prog="program", description=None, argv=["two", "--n-rows", "3"])
    assert called == [Group(n_rows=3)]
    with pytest.raises(UserError, match=r"--n-rows \(0\) must be at least 1"):
        run_subcommand(commands, prog="program", description=None, argv=["two", "--n-rows", "0"])


def test_options_beside_a_config_are_checked_like_others():
    assert list(as_arguments(Group)) == ["n_rows"]
    assert validated(Group, {}) == Group()
    with pytest.raises(UserError) as error:
        validated(Group, {"n_rows": -2})
    assert str(error.value) == "--n-rows (-2) must be at least 1"


PROGRAMS = [
    *(module.Options for module in (generate, coordinates, demo, kv_memory, masks, measure, memory, ablate)),
    *(module.Options for module in (attention, decode, loss, train, evaluate, report)),
    *(convert.Export, convert.Import),
]


def names(options: type) -> dict[str, str | None]:
    """Each option as it is typed, with its default where that is a plain value."""
    found = {}
    for name, field in options.__pydantic_fields__.items():
        if hasattr(field.annotation, "__pydantic_fields__"):
            found |= names(field.annotation)
        else:
            simple = isinstance(field.default, str | int | float | Path) and not isinstance(field.default, bool)
            found[name] = str(field.default) if simple else None
    return found


@pytest.mark.parametrize("options", PROGRAMS, ids=lambda options: f"{options.__module__}.{options.__name__}")
def test_help_shows_the_text_and_the_default_of_every_option(options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        parse(options, prog="program", description=None, argv=["--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    shown = " ".join(lines)
    for cls in options.__mro__:
        for group in [cls, *(f.annotation for f in cls.__dict__.get("__pydantic_fields__", {}).values())]:
            for name, field in getattr(group, "__pydantic_fields__", {}).items():
                if not hasattr(field.annotation, "__pydantic_fields__"):
                    assert field.description or name in names(options.__mro__[1]), f"{name} has no text"
                    assert " ".join((field.description or "").split()) in shown
    for name, default in names(options).items():
        assert f"--{name.replace('_', '-')}" in shown or "PATH" in shown
        if default is not None:
            assert f"(default: {default})" in shown or f"(default: {shlex.quote(default)})" in shown
