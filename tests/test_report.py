"""The report: means and paired differences with intervals, tables that repeat, and a page that needs no network."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL, save_run
from scipy import stats

from configs.load import load
from configs.run_dir import RunDir
from model import cost
from model.config import describe_layers
from model.errors import UserError
from scripts.report import __main__ as program_of_report
from scripts.report import statistics
from scripts.report.collect import STUDY, collect
from scripts.report.plots import PLOTS, _front
from scripts.report.tables import compared, megabytes, spread
from scripts.report.write import report

PNG = b"\x89PNG"
FACTS = {"runtime": "device cpu", "commit": "c0ffee", "versions": {"torch": "2.13.0"}, "data": "d"}


def planted(
    root: Path, variant: str, seed: int, loss: float, *, stream: str = "5eed", evaluations=None, facts=None, **model
) -> dict:
    """A finished run that never ran, with this validation loss; returns its entry in study.json."""
    name = f"cells/{variant}-s{seed}"
    values = {"pattern": "5:1", "window": 5, "vocab_size": 257} | model
    config = load(None, {"name": name, "out_dir": str(root), "seed": seed, "model": SMALL | values})
    run = RunDir(config.path)
    run.begin(config, FACTS | (facts or {}))
    lines = [
        {
            "step": step,
            "tokens": step * 8192,
            "elapsed_s": step * (1 + seed / 7),
            "train_loss": loss + 2 / step,
            "tokens_per_s": 1000.0 + seed,
            "peak_memory_train_bytes": 3_000_000,
            "peak_memory_method": "cpu-live-tensors",
            "kernel": "tiles",
        }
        | ({"val_loss": loss + 1 / step} if step % 5 == 0 else {})
        for step in range(1, 11)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bits_per_byte": loss / 2}
    run.finish(
        lines[-1]
        | last
        | {"variant": name.split("/")[1], "layers": describe_layers(config.model.layers), "best_val_loss": loss}
        | {"n_params": cost.n_params(config.model), "stream_hash": stream, "kv_cache_dtype": "bfloat16"}
        | {"kv_cache_bytes": {str(n): cost.cache_bytes(config.model, n) for n in (16, 32_768)}}
    )
    if evaluations:
        (run.path / "evaluations.json").write_text(json.dumps(evaluations))
    return {"path": name, "variant": variant, "seed": seed}


def study(root: Path, cells: list[dict], baseline: str = "full") -> Path:
    root.mkdir(exist_ok=True)
    content = {"name": "planted", "question": "What is found?", "baseline": baseline, "cells": cells}
    (root / STUDY).write_text(json.dumps(content))
    return root


NOISE = {seed: random.Random(seed).gauss(0, 0.05) for seed in range(1, 6)}  # of the data's order: shared in a pair
OWN = {seed: random.Random(99 + seed).gauss(0, 0.002) for seed in NOISE}  # of the variant


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """Five seeds of a baseline, a variant that is worse by 0.02 nats, and one that differs by noise alone."""
    root = tmp_path_factory.mktemp("study")
    cells = []
    for seed, shared in NOISE.items():
        cells.append(planted(root, "full", seed, 3 + shared, pattern="full", window=None))
        cells.append(planted(root, "narrow", seed, 3.02 + shared + OWN[seed], window=3))
        cells.append(planted(root, "wide", seed, 3 + shared + OWN[seed] - sum(OWN.values()) / 5, window=9))
    return study(root, cells)


# Statistics.


def test_a_planted_difference_is_found_and_a_planted_null_is_not(lab):
    c = collect([lab])
    assert compared(c, "val_perplexity", "full") == "baseline"
    assert re.fullmatch(r"\+0\.4\d+ ± 0\.0\d+", compared(c, "val_perplexity", "narrow"))
    assert compared(c, "val_perplexity", "wide").endswith(", not distinguishable")


def test_a_difference_smaller_than_the_spread_of_seeds_is_found_in_pairs_alone(lab):
    c = collect([lab])
    one, other = (c.results[c.results.variant == v]["val_loss"] for v in ("narrow", "full"))
    assert stats.ttest_ind(one, other).pvalue > 0.1
    assert statistics.difference(c.results, "val_loss", "narrow", "full").holds_zero is False


def test_the_interval_is_that_of_a_paired_t_test():
    table = pd.DataFrame(
        {"variant": list("aaaabbbb"), "seed": [1, 2, 3, 4, 4, 3, 2, 1], "x": [1.0, 2.5, 3.1, 4.2, 4.0, 3.0, 2.0, 1.0]}
    )
    found = statistics.difference(table, "x", "a", "b")
    expected = stats.ttest_rel([1.0, 2.5, 3.1, 4.2], [1.0, 2.0, 3.0, 4.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.n == 4


def test_the_interval_of_a_mean_is_students():
    x = [3.0, 3.4, 2.9]
    found = statistics.estimate(pd.Series(x))
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(0.95)))


def test_only_seeds_that_both_have_are_compared():
    table = pd.DataFrame({"variant": list("aaabb"), "seed": [1, 2, 3, 2, 3], "x": [100.0, 2.0, 3.0, 1.0, 2.0]})
    found = statistics.difference(table, "x", "a", "b")
    assert (found.mean, found.half, found.n) == (1.0, 0.0, 2)
    assert found.holds_zero is False


def test_equal_results_are_not_distinguishable():
    table = pd.DataFrame({"variant": list("aabb"), "seed": [1, 2, 1, 2], "x": [5.0, 6.0, 5.0, 6.0]})
    assert statistics.difference(table, "x", "a", "b").holds_zero is True


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0, pattern="full", window=None), planted(tmp_path, "narrow", 1, 3.5)]
    c = collect([study(tmp_path, cells)])
    assert statistics.of_variant(c.results, "val_loss", "narrow").half is None
    assert compared(c, "val_perplexity", "narrow") == "+13.03, one seed: no interval"


def test_variants_without_a_common_seed_are_not_compared(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0, pattern="full", window=None), planted(tmp_path, "narrow", 2, 3.5)]
    assert compared(collect([study(tmp_path, cells)]), "val_perplexity", "narrow") == "no seed in common"


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (12.3456, 0.0789, "12.346 ± 0.079"),
        (12.3456, 7.89, "12.3 ± 7.9"),
        (12345.6, 789.0, "12,346 ± 789"),
        (0.5, 1e-9, "0.500000 ± 0.000000"),
        (1234.56, None, "1,234.6"),
        (1.23456, 0.0, "1.235"),
    ],
)
def test_a_mean_is_shown_to_the_digits_that_its_interval_leaves(mean, half, shown):
    assert spread(statistics.Estimate(mean=mean, half=half, n=3)) == shown


def test_what_was_not_measured_is_said_to_be_so():
    assert (spread(None), megabytes(None)) == ("not measured", "not measured")


# Collecting.


def test_clocks_are_kept_apart_from_what_comes_out_the_same(lab):
    c = collect([lab])
    assert not {"elapsed_s", "tokens_per_s"} & set(c.results)
    assert {"elapsed_s", "tokens_per_s", "runtime"} <= set(c.timings)


def test_the_keys_in_which_variants_differ_are_columns(lab):
    c = collect([lab])
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
    with pytest.raises(UserError, match="2 evaluation streams among these runs: their losses cannot share a table"):
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


def test_runs_that_differ_in_nothing_else_have_no_notes(lab):
    assert collect([lab]).notes == []


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
    ended.assert_refused(f"nothing is finished in {tmp_path} yet")


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
    ended.assert_refused("--baseline (wid) is none of wide-s1")


def test_the_same_variant_and_seed_twice_is_refused(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0)]
    with pytest.raises(UserError, match="two runs are full with seed 1: give one of them"):
        collect([study(tmp_path, [*cells, *cells])])


def test_different_experiments_of_one_name_are_not_averaged(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0), planted(tmp_path, "full", 2, 3.0, window=4)]
    with pytest.raises(UserError, match="different experiments are both called full: report them apart"):
        collect([study(tmp_path, cells)])


def test_a_run_that_is_not_finished_is_refused(program, tmp_path):
    save_run(tmp_path / "run")
    ended = program(program_of_report.main, tmp_path / "run", "--out", tmp_path / "report")
    ended.assert_refused(f"{tmp_path / 'run'} is not finished: repeat its training command first")
    assert not (tmp_path / "report").exists()


# What is written.


@pytest.fixture(scope="module")
def written(lab, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    for entry in json.loads((lab / STUDY).read_text())["cells"]:
        stream = {f"stream_perplexity[window=4,n_sink={k},length=99]": 50.0 / (1 + k) for k in (0, 1, 4)}
        contexts = {f"perplexity[context=32{how}]": 30.0 for how in ("", ",rope=yarn")}
        files = {
            "loss_by_position": {"position": [1.0, 2.5, 6.0], "loss": [5.0, 4.0, 3.5]},
            "recall_by_distance": {"distance": [1, 2, 4, 8], "recall": [1.0, 0.5, None, 0.1], "chance": 0.04},
            "measured": {"decode_tokens_per_s": 100.0 + entry["seed"]},
            "evaluations": stream
            | contexts
            | {"recomputed_perplexity[context=4,length=99]": 9.0, "evaluated_step": 10},
        }
        for name, content in files.items():
            (lab / entry["path"] / f"{name}.json").write_text(json.dumps(content))
    report([lab], out)
    return out


def test_a_report_of_a_study_is_a_page_tables_and_plots(written):
    names = {file.name for file in written.iterdir()}
    assert names == {f"{plot}.png" for plot in PLOTS} | {"report.md", "report.html", "results.csv", "timings.csv"}
    assert all((written / f"{plot}.png").read_bytes().startswith(PNG) for plot in PLOTS)


def test_the_same_runs_give_the_same_table_again(written, lab, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.report.write.PLOTS", {})
    report([lab], tmp_path)
    one, other = (pd.read_csv(out / "results.csv").drop(columns="run") for out in (written, tmp_path))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_every_number_of_a_run_links_to_its_directory(written, lab):
    links = re.findall(r"\]\(([^)]+)/\)", (written / "report.md").read_text())
    assert len(links) == (5 + 2) * 15  # each figure of a run, and seeds of variants in two tables
    assert {(written / link).resolve() for link in links} == {run.resolve() for run in (lab / "cells").iterdir()}


VOID = ("meta", "link", "img", "br")


class Page(HTMLParser):
    """What a browser would fetch, run, or find wrongly nested."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.sources += [found["src"]] if "src" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag


def test_the_page_needs_no_network_and_runs_no_script(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(page.sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not [link for link in page.links if re.match(r"(\w+:)?//", link)]
    assert "script" not in page.tags
    assert "url(" not in text
    assert page.open == []


def test_the_page_shows_names_as_they_are(written):
    text = (written / "report.html").read_text()
    assert "<p>What is found?</p>" in text
    assert text.count("<figcaption>") == len(PLOTS)
    assert text.count("<table>") == 4
    assert "<td>full*2</td>" in text
    assert "<em>" not in text


@pytest.mark.parametrize(
    ("more_is_better", "front"), [(False, [(1, 9), (2, 5), (4, 4)]), (True, [(6, 8), (4, 4)])], ids=["cost", "speed"]
)
def test_the_front_is_what_no_other_beats_in_both(more_is_better, front):
    points = [(4, 4), (1, 9), (2, 5), (3, 7), (6, 8), (2, 6), (1, 9.5)]
    assert _front(points, more_is_better) == front


def test_a_plot_that_no_longer_applies_goes(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.report.write.PLOTS", {name: PLOTS[name] for name in ("difference", "loss")})
    report([lab], tmp_path)
    assert (tmp_path / "difference.png").exists()
    report([lab / "cells" / "full-s1"], tmp_path)
    assert not (tmp_path / "difference.png").exists()
    assert (tmp_path / "loss.png").exists()


def test_a_study_is_reported_where_it_is_and_the_table_printed(program, tmp_path):
    cells = [planted(tmp_path, "full", seed, 3.0) for seed in (1, 2)]
    ended = program(program_of_report.main, study(tmp_path, cells))
    assert ended.code == 0
    table = ended.out.splitlines()
    assert len({len(row) for row in table[:3]}) == 1
    assert [row.split("|")[1].strip() for row in table[:3:2]] == ["variant", "full"]
    assert table[-1] == f"{tmp_path}/report.html"
    assert (tmp_path / "report.html").exists()


def test_what_a_resumed_run_measured_before_counts(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0)]
    run = RunDir(tmp_path / cells[0]["path"])
    run.finish({key: x for key, x in run.summary().items() if not key.startswith("peak_memory")})
    assert list(collect([study(tmp_path, cells)]).results["peak_memory_train_bytes"]) == [3_000_000]
