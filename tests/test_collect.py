"""Runs collected for a report: columns, what is told apart, and what may not share a table."""

import json
import re

import pytest
from conftest import save_run
from planted import planted, study

from artifacts.run_dir import RunDir
from model.errors import UserError
from scripts.report import __main__ as program_of_report
from scripts.report.collect import collect
from scripts.report.write import report


def test_clocks_are_kept_apart_from_what_comes_out_the_same(planted_study):
    c = collect([planted_study])
    assert not {"elapsed_s", "tokens_per_s"} & set(c.results)
    assert {"elapsed_s", "tokens_per_s", "runtime"} <= set(c.timings)


def test_the_keys_in_which_variants_differ_are_columns(planted_study):
    c = collect([planted_study])
    assert c.varying == ["model.pattern", "model.window"]
    assert list(c.results["model.window"].dropna().unique()) == [3, 9]


def test_evaluations_become_columns_and_their_clocks_go_to_the_timings(tmp_path):
    found = {"recall_below_window": 0.75, "stream_tokens_per_s": 321.0}
    cells = [
        planted(tmp_path, v, s, 3.0, evaluations=found, window=w) for v, w in (("full", 3), ("b", 4)) for s in (1, 2)
    ]
    c = collect([study(tmp_path, cells)])
    assert list(c.results["recall_below_window"]) == [0.75] * 4
    assert "stream_tokens_per_s" not in c.results
    assert list(c.timings["stream_tokens_per_s"]) == [321.0] * 4
    report([tmp_path], tmp_path)
    assert re.search(r"\| recall\\_below\\_window +\| 0\.750 +\| 0\.750 ≈ +\|", (tmp_path / "report.md").read_text())


def test_runs_evaluated_on_different_streams_share_no_table(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "b", 1, 3.0, stream="other", window=3)]
    with pytest.raises(
        UserError, match="these runs have 2 different evaluation streams: their losses are not comparable"
    ):
        report([study(tmp_path, cells)], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"runtime": "device cuda"}, "Machines differ (device cpu: 1 run; device cuda: 1 run): do not compare"),
        ({"commit": None}, "Commits differ"),
        ({"versions": {"torch": "2.12.0"}}, "Versions of torch differ"),
    ],
)
def test_what_else_differs_between_rows_is_marked(tmp_path, facts, words):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "b", 1, 3.0, facts=facts, window=3)]
    notes = collect([study(tmp_path, cells)]).notes
    assert len(notes) == 1
    assert notes[0].startswith(words)


def test_kernels_and_steps_that_differ_are_marked(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "b", 1, 3.0, window=3)]
    run = RunDir(tmp_path / cells[1]["path"])
    run.finish(run.summary() | {"kernel": "flex"})
    config = json.loads((run.path / "config.json").read_text())
    config["config"]["train"]["global_batch_tokens"] *= 2
    (run.path / "config.json").write_text(json.dumps(config))
    kernels, steps = collect([study(tmp_path, cells)]).notes
    assert kernels.startswith("Kernels differ")
    assert steps.startswith("Tokens per step differ (8192: 1 run; 16384: 1 run)")


def test_runs_that_differ_in_nothing_else_have_no_notes(planted_study):
    assert collect([planted_study]).notes == []


def test_cells_that_are_not_finished_are_named(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "b", 1, 3.0, window=3)]
    (tmp_path / cells[1]["path"] / "summary.json").unlink()
    c = collect([study(tmp_path, cells)])
    assert c.notes == ["1 of 2 cells are not finished: b seed 1."]
    assert c.variants == ["full"]


def test_without_its_baseline_a_study_is_reported_without_differences(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "b", 1, 3.0, window=3)]
    (tmp_path / cells[0]["path"] / "summary.json").unlink()
    c = collect([study(tmp_path, cells)])
    assert c.baseline is None
    assert any(note.startswith("No cell of the baseline, full, is finished") for note in c.notes)
    report([tmp_path], tmp_path)


def test_a_study_without_a_finished_cell_is_refused(tmp_path, program):
    cells = [planted(tmp_path, "full", 1, 3.0)]
    (tmp_path / cells[0]["path"] / "summary.json").unlink()
    ended = program(program_of_report.main, study(tmp_path, cells))
    ended.assert_refused(f"there are no finished runs in {tmp_path} yet")


def test_seeds_of_single_runs_are_one_variant(tmp_path):
    for seed in (1, 2):
        planted(tmp_path, "wide", seed, 3.0)
    planted(tmp_path, "narrow", 1, 3.0, window=3)
    c = collect(sorted((tmp_path / "cells").iterdir()), baseline="wide-s")
    assert list(c.results["variant"]) == ["narrow-s1", "wide-s", "wide-s"]
    assert list(c.results["seed"]) == [1, 1, 2]


def test_an_unknown_baseline_is_refused(tmp_path, program):
    planted(tmp_path, "wide", 1, 3.0)
    ended = program(program_of_report.main, tmp_path / "cells" / "wide-s1", "--baseline", "wid")
    ended.assert_refused("--baseline (wid) must be one of wide-s1")


def test_the_same_variant_and_seed_twice_is_refused(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0)]
    with pytest.raises(UserError, match="two runs are full with seed 1: leave one out"):
        collect([study(tmp_path, [*cells, *cells])])


def test_different_experiments_of_one_name_are_not_averaged(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "full", 2, 3.0, window=4)]
    with pytest.raises(UserError, match="different experiments have the same name full: report them separately"):
        collect([study(tmp_path, cells)])


def test_a_run_that_is_not_finished_is_refused(program, tmp_path):
    save_run(tmp_path / "run")
    ended = program(program_of_report.main, tmp_path / "run", "--out", tmp_path / "report")
    ended.assert_refused(f"{tmp_path / 'run'} is not finished: run its training command again first")
    assert not (tmp_path / "report").exists()
