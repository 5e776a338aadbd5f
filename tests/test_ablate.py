"""Running a study: cells that are done once, measured by any command, and what fails is said."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from studies import MEASURE, ablate, cells_of, results

import train
from artifacts.run_dir import RunDir
from scripts.ablate import runner

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # programs that this process imported


def test_cells_are_trained_measured_and_reported(write_study, in_this_process):
    file = write_study(measure=[MEASURE])
    assert ablate(file) == 0
    names = [f"{variant}-s{seed}" for seed in (1, 2) for variant in ("wide", "narrow")]
    assert in_this_process == [f"{name} {job}" for name in names for job in ("training", "scripts.measure")]
    table = pd.read_csv(file.with_suffix("") / "results.csv")
    assert list(table["variant"] + "-s" + table["seed"].astype(str)) == names
    assert (file.with_suffix("") / "report.html").exists()
    summaries = [RunDir(file.with_suffix("") / run).summary() for run in table["run"]]
    assert [x["val_perplexity"] for x in summaries] == list(table["val_perplexity"])


def test_what_is_finished_is_not_done_again(write_study, in_this_process):
    file = write_study(measure=[MEASURE], seeds=[1])
    ablate(file)
    before = {path: path.stat().st_mtime_ns for path in (file.with_suffix("") / "cells").rglob("*")}
    in_this_process.clear()
    assert ablate(file) == 0
    assert in_this_process == []
    assert {path: path.stat().st_mtime_ns for path in (file.with_suffix("") / "cells").rglob("*")} == before


@pytest.mark.usefixtures("unmeasured_memory")
def test_a_new_seed_or_variant_runs_alone(write_study, in_this_process):
    ablate(write_study(seeds=[1]))
    in_this_process.clear()
    variants = {"wide": {"model": {"window": 9}}, "narrow": {"model": {"window": 3}}, "new": {"model": {"window": 4}}}
    ablate(write_study(variants=variants, seeds=[1]))
    assert in_this_process == ["new-s1 training"]


PROBE = """
import json, sys
from pathlib import Path
run, *words = sys.argv[1:]
if "fail" in words:
    sys.exit(f"it failed for {Path(run).name[:4]}")
file = Path(run) / "evaluations.json"
known = json.loads(file.read_text()) if file.exists() else {}
file.write_text(json.dumps(known | {word: 0.5 for word in words}))
"""


@pytest.fixture
def probe(tmp_path, monkeypatch) -> None:
    """A program `probe` that writes columns, or fails."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("unmeasured_memory", "probe")
def test_any_command_brings_columns_and_a_new_one_runs_alone(write_study, in_this_process):
    ablate(write_study(measure=[["probe", "first"]], seeds=[1]))
    in_this_process.clear()
    file = write_study(measure=[["probe", "first"], ["probe", "second"]], seeds=[1])
    assert ablate(file) == 0
    assert in_this_process == ["wide-s1 probe", "narrow-s1 probe"]
    assert (pd.read_csv(file.with_suffix("") / "results.csv")[["first", "second"]] == 0.5).all(axis=None)


@pytest.mark.usefixtures("unmeasured_memory", "probe")
def test_a_measurement_that_fails_is_reported_and_the_others_run(write_study, in_this_process, capsys):
    file = write_study(measure=[["probe", "fail"], ["probe", "second"]], seeds=[1])
    assert ablate(file) == 1
    failures = [json.loads(line) for line in (file.with_suffix("") / "failures.jsonl").read_text().splitlines()]
    assert [(x["cell"][:7], x["job"]) for x in failures] == [("wide-s1", "probe fail"), ("narrow-", "probe fail")]
    assert "failed: narrow-s1" in capsys.readouterr().err
    assert list(pd.read_csv(file.with_suffix("") / "results.csv")["second"]) == [0.5, 0.5]


@pytest.mark.usefixtures("unmeasured_memory")
def test_a_cell_that_fails_is_reported_and_run_again_by_the_same_command(
    write_study, in_this_process, monkeypatch, capsys
):
    file = write_study(seeds=[1])
    with monkeypatch.context() as patch:
        run = train.run

        def fail(config):
            if config.model.window == 9:
                raise train.DivergedError("step 5: the loss is nan")
            return run(config)

        patch.setattr(train, "run", fail)
        assert ablate(file) == 1
    (failure,) = (json.loads(line) for line in (file.with_suffix("") / "failures.jsonl").read_text().splitlines())
    assert (failure["job"], failure["cell"][:7]) == ("training", "wide-s1")
    report = (file.with_suffix("") / "report.md").read_text()
    assert "1 of 2 cells are not finished: wide seed 1." in report
    in_this_process.clear()
    assert ablate(file) == 0
    assert in_this_process == ["wide-s1 training"]


@pytest.mark.usefixtures("unmeasured_memory")
def test_shards_in_turn_come_to_one_report(write_study, in_this_process):
    file, whole = write_study(seeds=[1]), write_study("whole", seeds=[1])
    assert ablate(whole) == 0
    for i in (1, 2):
        assert ablate(file, shard=f"{i}/2") == 0
    assert results(file) == results(whole)


def test_places_share_the_threads_of_a_cpu(write_study, monkeypatch):
    cell = cells_of(write_study())[0]
    monkeypatch.setattr(runner.torch, "get_num_threads", lambda: 5)
    assert runner.share_of_machine(cell, 0, 1) == {}
    assert runner.share_of_machine(cell, 1, 2) == {"OMP_NUM_THREADS": "2"}
    assert runner.share_of_machine(cell, 8, 9) == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("visible", "expected"), [(None, "012012"), ("4,6", "464646")])
def test_places_take_the_visible_gpus_in_turn(write_study, monkeypatch, visible, expected):
    cell = cells_of(write_study())[0]
    monkeypatch.setattr(runner, "resolve", lambda device: SimpleNamespace(device=runner.torch.device("cuda")))
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shares = [runner.share_of_machine(cell, place, 6)["CUDA_VISIBLE_DEVICES"] for place in range(6)]
    assert "".join(shares) == expected
