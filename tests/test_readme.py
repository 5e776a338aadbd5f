"""The demo's table in README.md: written from finished runs, between markers."""

import pytest
from conftest import ROOT
from planted import planted

from model.errors import UserError
from scripts import readme
from scripts.demo import VARIANTS


@pytest.fixture
def options(tmp_path):
    """Finished runs of all variants, and a file with markers."""
    for i, name in enumerate(VARIANTS):
        planted(tmp_path, name, 1, 3 + i / 10, window=3 + i)
        (tmp_path / f"cells/{name}-s1").rename(tmp_path / name)
    (tmp_path / "README.md").write_text("before\n<!-- demo -->\nstale\n<!-- /demo -->\nafter\n")
    return readme.Options(runs=tmp_path, readme=tmp_path / "README.md")


def test_the_table_of_finished_runs_replaces_what_stands_between_the_markers(options):
    content = readme.update(options)
    assert options.readme.read_text() == f"before\n<!-- demo -->\n{content}\n<!-- /demo -->\nafter\n"
    for name in VARIANTS:
        assert f"\n| {name}" in content
    assert content.endswith("Measured on device cpu; torch 2.13.0. Training all 3 took 34 s.")


def test_writing_the_table_twice_changes_nothing(options):
    readme.update(options)
    once = options.readme.read_text()
    readme.update(options)
    assert options.readme.read_text() == once


@pytest.mark.parametrize("text", ["", "<!-- demo -->", "<!-- /demo --> <!-- demo -->"])
def test_a_file_without_the_markers_is_refused_and_kept(options, text):
    options.readme.write_text(text)
    with pytest.raises(UserError, match="must have one <!-- demo --> and, after it, one <!-- /demo -->"):
        readme.update(options)
    assert options.readme.read_text() == text


def test_runs_of_two_machines_are_refused(options):
    planted(options.runs, "mha", 1, 3.0, facts={"runtime": "device cuda"}, window=3)
    (options.runs / "mha").rename(options.runs / "other")
    (options.runs / "cells/mha-s1").rename(options.runs / "mha")
    with pytest.raises(UserError, match=r"differ in machine or versions, run the demo again: device cpu.*device cuda"):
        readme.update(options)


def test_the_readme_has_the_markers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(readme.START) == text.count(readme.END) == 1
