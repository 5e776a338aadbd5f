"""A written report: tables that repeat, plots, and a page that needs no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from conftest import PNG
from planted import planted, study

from artifacts.run_dir import RunDir
from scripts.report import __main__ as program_of_report
from scripts.report.collect import STUDY, collect
from scripts.report.plots import PLOTS, _front
from scripts.report.write import report


@pytest.fixture(scope="module")
def written(planted_study, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    for entry in json.loads((planted_study / STUDY).read_text())["cells"]:
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
            (planted_study / entry["path"] / f"{name}.json").write_text(json.dumps(content))
    report([planted_study], out)
    return out


def test_a_report_of_a_study_is_a_page_tables_and_plots(written):
    names = {file.name for file in written.iterdir()}
    assert names == {f"{plot}.png" for plot in PLOTS} | {"report.md", "report.html", "results.csv", "timings.csv"}
    assert all((written / f"{plot}.png").read_bytes().startswith(PNG) for plot in PLOTS)


def test_the_same_runs_give_the_same_table_again(written, planted_study, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.report.write.PLOTS", {})
    report([planted_study], tmp_path)
    one, other = (pd.read_csv(out / "results.csv").drop(columns="run") for out in (written, tmp_path))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_every_number_of_a_run_links_to_its_directory(written, planted_study):
    links = re.findall(r"\]\(([^)]+)/\)", (written / "report.md").read_text())
    assert len(links) == (5 + 2) * 15  # each figure of a run, and seeds of variants in two tables
    assert {(written / link).resolve() for link in links} == {
        run.resolve() for run in (planted_study / "cells").iterdir()
    }


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


def test_a_plot_that_no_longer_applies_goes(planted_study, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.report.write.PLOTS", {name: PLOTS[name] for name in ("difference", "loss")})
    report([planted_study], tmp_path)
    assert (tmp_path / "difference.png").exists()
    report([planted_study / "cells" / "full-s1"], tmp_path)
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


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (STUDY, {"name": "x"}, "it has no question, baseline, cells): run the study again"),
        ("cells/full-s1/loss_by_position.json", {}, "it has no position, loss): evaluate again"),
        ("cells/full-s1/recall_by_distance.json", {"distance": [], "recall": []}, "it has no chance): evaluate again"),
    ],
)
def test_a_file_that_lacks_something_is_refused_by_its_name(program, tmp_path, name, content, said):
    study(tmp_path, [planted(tmp_path, "full", 1, 3.0)])
    (tmp_path / name).write_text(json.dumps(content))
    program(program_of_report.main, tmp_path).assert_refused(f"{tmp_path / name} is damaged ({said}")
