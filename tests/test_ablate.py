"""Studies: what their files may say, cells that are done once, and what is killed, stopped or fails."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, RUN, run_program, start_program

import train
from configs.run_dir import RunDir
from model import cost
from model.config import ModelConfig, describe_layers
from scripts.ablate import __main__ as lab
from scripts.ablate import cell as process
from scripts.ablate import runner
from scripts.ablate.plan import train_and_evaluation_flops
from scripts.ablate.study import cells, load_study
from scripts.memory import with_known_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # programs that this process imported
SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
MEASURE = ["scripts.measure", "--new-tokens", "3", "--rounds", "1", "--device", "cpu"]


def toml(values: dict) -> str:
    """Nested dictionaries as a line of TOML each: JSON's values are TOML's, but for tables."""
    return "".join(f"{key} = {inline(value)}\n" for key, value in values.items())


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {inline(x)}" for key, x in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture
def write(tmp_path, text) -> Callable[..., Path]:
    """Write a study of tiny runs, wide and narrow with seeds 1 and 2; changes replace what it says."""

    def write(name: str = "small", **changes) -> Path:
        run = {key: RUN[key] for key in ("device", "dtype", "compile", "model")}
        run["data"] = RUN["data"] | {"text": str(text), "dir": str(text.parent / "prepared")}
        run["train"] = RUN["train"] | changes.pop("train", {})
        content = {
            "question": "Is it small?",
            "baseline": "wide",
            "seeds": [1, 2],
            "overrides": run,
            "variants": {"wide": {"model": {"window": 9}}, "narrow": {"model": {"window": 3}}},
            "measure": [],
        } | changes
        file = tmp_path / f"{name}.toml"
        file.write_text(toml({key: x for key, x in content.items() if x is not None}), encoding="utf-8")
        return file

    return write


class InThisProcess:
    """A cell's process that is none: does its job as soon as it is told."""

    jobs: list[str]  # of all, as "variant's directory: job"

    def __init__(self, words, environment):
        self.stdin, self.words, self.returncode = self, words.name, None

    def write(self, line: bytes) -> None:
        self.job = json.loads(line)

    def flush(self) -> None:
        name = Path(self.job["run"]).name.rsplit("-", 1)[0]
        self.jobs.append(f"{name} {self.job.get('command', ['training'])[0]}")
        try:
            process.do(self.job)
        except SystemExit as end:
            self.returncode = end.code if isinstance(end.code, int) else 1
            Path(self.words).write_text(f"{end.code}\n")
        except Exception as error:
            Path(self.words).write_text(f"Traceback\n{error!r}\n")
            self.returncode = 1
        else:
            self.returncode = 0

    def close(self) -> None: ...

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch, unmeasured_speed) -> list[str]:
    """Cells without processes of their own, and reports without plots; the jobs that were begun."""
    jobs: list[str] = []
    monkeypatch.setattr(InThisProcess, "jobs", jobs, raising=False)
    monkeypatch.setattr(runner, "cell_process", InThisProcess)
    monkeypatch.setattr(runner, "POLL_S", 0.001)
    monkeypatch.setattr("scripts.report.write.draw", lambda collected, out: {})
    monkeypatch.setattr(sys, "argv", sys.argv)  # which measuring changes
    return jobs


def ablate(file: Path, **options) -> int:
    return lab.ablate(lab.Options(study=file, out=file.with_suffix(""), **options))


def results(file: Path) -> bytes:
    return (file.with_suffix("") / "results.csv").read_bytes()


def cells_of(file: Path):
    return cells(load_study(file), file, file.with_suffix(""))


# What a file may say.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "wid"}, "baseline (wid) is no variant; did you mean wide?"),
        ({"baseline": "mha"}, "baseline (mha) is no variant; they are wide, narrow"),
        ({"baseline": None}, "baseline"),
        ({"variants": {}}, "it has no variants: give [variants.NAME] tables, or a [grid]"),
        ({"seeds": []}, "seeds ([]) must be some, each once"),
        ({"seeds": [1, 2, 1]}, "seeds ([1, 2, 1]) must be some, each once"),
        ({"seeds": ["a"]}, "seeds"),
        ({"varaints": {}}, "varaints is unknown; did you mean variants?"),
        ({"grid": {"model": {"window": 3}}}, "grid.model.window (3) must be a list of the values to try"),
        ({"grid": {"model": {"window": []}}}, "grid.model.window ([]) must be a list"),
        ({"overrides": {"seed": 3}}, "seed is set by the study for each cell"),
        ({"variants": {"wide": {"name": "x"}}}, "name is set by the study for each cell"),
        ({"measure": [[]]}, "measure has an empty command"),
        ({"base": "configs/dmo.toml"}, "configs/dmo.toml does not exist; did you mean configs/demo.toml?"),
        (
            {"variants": {"wide": {"model": {"windw": 3}}}},
            "variant 'wide': model.windw is unknown; did you mean window?",
        ),
        (
            {"variants": {"wide": {"model": {"n_kv_head": 3}}}},
            "variant 'wide': model: n_head (4) must be divisible by n_kv_head (3)",
        ),
        (
            {"variants": {"wide": {"model": {"window": 9}}, "same": {"model": {"window": 9}}}},
            "variants 'wide' and 'same' are the same experiment: leave one out",
        ),
        ({"measure": [["scripts.mesure"]]}, "measure: there is no module scripts.mesure"),
    ],
    ids=str,
)
def test_a_wrong_study_is_refused_in_one_line(write, program, changes, words):
    file = write(**changes)
    ended = program(lab.main, file, "--out", file.with_suffix(""))
    ended.assert_refused(f"{file}: ", words)
    assert not file.with_suffix("").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], "--jobs (0) must be at least 1"),
        *((["--shard", x], f"--shard ({x}) must be i/n with i from 1 to n") for x in ("0/2", "3/2", "1", "a/b")),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(write, program, options, words):
    program(lab.main, write(), *options).assert_refused(words)


def test_a_study_that_is_not_there_is_refused_with_the_nearest_name(write, program):
    file = write()
    program(lab.main, file.with_name("smal.toml")).assert_refused(f"smal.toml does not exist; did you mean {file}?")


def test_a_grid_is_all_combinations_beside_the_named_variants(write):
    grid = {"model": {"window": [3, 5], "pattern": ["swa", "1:1"]}, "optim": {"muon_lr": [0.01]}}
    file = write(grid=grid, variants={"wide": {"model": {"window": 9}}})
    first = cells_of(file)[:5]
    assert [cell.variant for cell in first] == [
        "wide",
        *("window=3 pattern=swa", "window=3 pattern=1:1", "window=5 pattern=swa", "window=5 pattern=1:1"),
    ]
    models = [cell.config.model for cell in first]
    assert [(m.window, m.pattern) for m in models] == [(9, "swa full"), (3, "swa"), (3, "1:1"), (5, "swa"), (5, "1:1")]
    assert [cell.config.optim.muon_lr for cell in first] == [0.02, 0.01, 0.01, 0.01, 0.01]


def test_variants_differ_from_the_base_in_their_overrides_alone(write):
    wide, narrow = (cell.config for cell in cells_of(write())[:2])
    assert wide.model.n_embd == RUN["model"]["n_embd"]
    assert narrow.model_copy(update={"name": wide.name, "model": wide.model}) == wide
    assert narrow.model.model_copy(update={"window": 9}) == wide.model


def test_one_seed_comes_after_the_other_so_that_pairs_are_whole(write):
    assert [(cell.seed, cell.variant) for cell in cells_of(write())] == [
        (1, "wide"),
        (1, "narrow"),
        (2, "wide"),
        (2, "narrow"),
    ]


def test_a_cell_is_named_by_its_content_wherever_it_stands(write):
    file, other = write(), write("other", seeds=[2, 1], question="", train={"log_every": 1})
    one, two = ({c.config.name for c in cells_of(f)} for f in (file, other))
    assert one == two
    assert len(one) == 4
    assert not one & {c.config.name for c in cells_of(write("longer", train={"max_steps": 13}))}


def test_shards_are_all_cells_each_once(write):
    every = cells_of(write(seeds=[1, 2, 3, 4]))
    shards = [lab.of_shard(every, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(map(len, shards)) == [2, 3, 3]
    assert sorted(str(cell) for shard in shards for cell in shard) == sorted(map(str, every))


def test_a_dry_run_shows_the_cells_and_leaves_nothing(write, program, monkeypatch):
    monkeypatch.setattr("scripts.ablate.plan.matmul_rate", lambda runtime: 1e12)
    file = write()
    ended = program(lab.main, file, "--dry-run", "--shard", "1/2", "--out", file.with_suffix(""))
    assert ended.code == 0, ended.err
    rows = [[x.strip() for x in line.split("|")[2:6]] for line in ended.out.splitlines() if line.startswith("|")]
    assert rows[2:] == [["wide", "1", "12 steps", "0.02 M"], ["wide", "2", "12 steps", "0.02 M"]]
    assert "An estimate: FLOPs at 25% (assumed) of the 1,000 GFLOP/s measured" in ended.out
    assert not file.with_suffix("").exists()


def test_the_estimate_counts_training_and_evaluation(write):
    config = with_known_vocabulary(cells_of(write(train={"eval_tokens": 480}))[0].config)
    per_row = cost.train_flops(config.model, 16)
    assert train_and_evaluation_flops(config) == pytest.approx(per_row * (12 * 6 + 3 * 30 / 3))


# Studies that ship.


def test_six_studies_ship_each_with_a_larger_sibling():
    names = {file.stem for file in SHIPPED}
    assert names == {
        name + kind
        for name in ("window", "ratio", "heads", "sinks", "recall", "extrapolation")
        for kind in ("", "-gpu")
    }


def shipped(name: str) -> dict[str, ModelConfig]:
    """The models of a study's variants, a vocabulary given."""
    file = ROOT / "configs" / "ablations" / f"{name}.toml"
    first = {cell.variant: cell.config.model for cell in reversed(cells(load_study(file), file, Path("out")))}
    return {variant: model.model_copy(update={"vocab_size": 2048}) for variant, model in reversed(first.items())}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_study_says_what_it_asks_and_has_three_seeds(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    assert study.question.endswith("?")
    assert study.seeds == (1, 2, 3)
    assert study.measure[0] == ("scripts.measure",)
    assert len(cells(study, file, Path("out"))) == 3 * len(study.all_variants())


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_windows_go_from_a_32nd_of_the_context_to_all_of_it(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    full, *models = shipped(f"window{kind}").values()
    assert [model.window for model in models] == [full.block_size // 2**n for n in (5, 4, 3, 2, 1, 0)]
    assert {describe_layers(model.layers[:6]) for model in models} == {"swa*5 full"}
    assert set(full.kinds) == {"full"}


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_ratios_fall_from_full_to_all_sliding_at_one_window(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    models = shipped(f"ratio{kind}")
    assert list(models) == ["full", "1:1", "3:1", "5:1", "7:1", "all sliding"]
    n_full = [model.kinds.count("full") for model in models.values()]
    assert n_full == sorted(n_full, reverse=True)
    assert n_full[0] == models["full"].n_layer > n_full[1] > n_full[2] > n_full[4] > n_full[5] == 0
    assert len({model.window for model in models.values()}) == 1


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_heads_are_compared_at_equal_shape_and_at_equal_parameters(monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    models = shipped(f"heads{kind}")
    n = {variant: cost.n_params(model) for variant, model in models.items()}
    assert n["MHA"] == n["MHA, SWA"] > n["GQA"] == n["GQA, SWA"] > n["MQA"] == n["MQA, SWA"]
    equal = [variant for variant in models if variant.endswith("=")]
    assert len(equal) == 4
    assert all(n[variant] == pytest.approx(n["MHA"], rel=1e-3) for variant in equal)


# Running.


def test_cells_are_trained_measured_and_reported(write, in_this_process):
    file = write(measure=[MEASURE])
    assert ablate(file) == 0
    names = [f"{variant}-s{seed}" for seed in (1, 2) for variant in ("wide", "narrow")]
    assert in_this_process == [f"{name} {job}" for name in names for job in ("training", "scripts.measure")]
    table = pd.read_csv(file.with_suffix("") / "results.csv")
    assert list(table["variant"] + "-s" + table["seed"].astype(str)) == names
    assert (file.with_suffix("") / "report.html").exists()
    summaries = [RunDir(file.with_suffix("") / run).summary() for run in table["run"]]
    assert [x["val_perplexity"] for x in summaries] == list(table["val_perplexity"])


def test_what_is_finished_is_not_done_again(write, in_this_process):
    file = write(measure=[MEASURE], seeds=[1])
    ablate(file)
    before = {path: path.stat().st_mtime_ns for path in (file.with_suffix("") / "cells").rglob("*")}
    in_this_process.clear()
    assert ablate(file) == 0
    assert in_this_process == []
    assert {path: path.stat().st_mtime_ns for path in (file.with_suffix("") / "cells").rglob("*")} == before


@pytest.mark.usefixtures("unmeasured_memory")
def test_a_new_seed_or_variant_runs_alone(write, in_this_process):
    ablate(write(seeds=[1]))
    in_this_process.clear()
    variants = {"wide": {"model": {"window": 9}}, "narrow": {"model": {"window": 3}}, "new": {"model": {"window": 4}}}
    ablate(write(variants=variants, seeds=[1]))
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
def test_any_command_brings_columns_and_a_new_one_runs_alone(write, in_this_process):
    ablate(write(measure=[["probe", "first"]], seeds=[1]))
    in_this_process.clear()
    file = write(measure=[["probe", "first"], ["probe", "second"]], seeds=[1])
    assert ablate(file) == 0
    assert in_this_process == ["wide-s1 probe", "narrow-s1 probe"]
    assert (pd.read_csv(file.with_suffix("") / "results.csv")[["first", "second"]] == 0.5).all(axis=None)


@pytest.mark.usefixtures("unmeasured_memory", "probe")
def test_a_measurement_that_fails_is_reported_and_the_others_run(write, in_this_process, capsys):
    file = write(measure=[["probe", "fail"], ["probe", "second"]], seeds=[1])
    assert ablate(file) == 1
    failures = [json.loads(line) for line in (file.with_suffix("") / "failures.jsonl").read_text().splitlines()]
    assert [(x["cell"][:7], x["job"]) for x in failures] == [("wide-s1", "probe fail"), ("narrow-", "probe fail")]
    assert "failed: narrow-s1" in capsys.readouterr().err
    assert list(pd.read_csv(file.with_suffix("") / "results.csv")["second"]) == [0.5, 0.5]


@pytest.mark.usefixtures("unmeasured_memory")
def test_a_cell_that_fails_is_reported_and_run_again_by_the_same_command(write, in_this_process, monkeypatch, capsys):
    file = write(seeds=[1])
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
def test_shards_in_turn_come_to_one_report(write, in_this_process):
    file, whole = write(seeds=[1]), write("whole", seeds=[1])
    assert ablate(whole) == 0
    for i in (1, 2):
        assert ablate(file, shard=f"{i}/2") == 0
    assert results(file) == results(whole)


def test_places_share_the_threads_of_a_cpu(write, monkeypatch):
    cell = cells_of(write())[0]
    monkeypatch.setattr(runner.torch, "get_num_threads", lambda: 5)
    assert runner.share_of_machine(cell, 0, 1) == {}
    assert runner.share_of_machine(cell, 1, 2) == {"OMP_NUM_THREADS": "2"}
    assert runner.share_of_machine(cell, 8, 9) == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("visible", "expected"), [(None, "012012"), ("4,6", "464646")])
def test_places_take_the_visible_gpus_in_turn(write, monkeypatch, visible, expected):
    cell = cells_of(write())[0]
    monkeypatch.setattr(runner, "resolve", lambda device: SimpleNamespace(device=runner.torch.device("cuda")))
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shares = [runner.share_of_machine(cell, place, 6)["CUDA_VISIBLE_DEVICES"] for place in range(6)]
    assert "".join(shares) == expected


# Stopped and killed: real processes.

LONG = {"max_steps": 150, "checkpoint_every": 7, "eval_every": 18}


@pytest.fixture
def one_thread(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner, "POLL_S", 0.01)


def when_at(step: int, run: Path, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as the metrics of a run say this step."""

    def watch():
        end = time.monotonic() + 60
        while runner.last_step(run) < step and time.monotonic() < end:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.usefixtures("one_thread")
def test_a_signal_loses_no_step_and_the_repetition_equals_an_undisturbed_study(write, request, capsys):
    file = write(train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    (cell,) = cells_of(file)
    watcher = when_at(20, cell.path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ablate(file) == 128 + signal.SIGTERM
    watcher.join()
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from there\n")
    run = RunDir(cell.path)
    assert 20 <= run.latest().step == run.metrics()[-1]["step"] < 150
    assert not (file.with_suffix("") / "failures.jsonl").exists()
    request.getfixturevalue("in_this_process")
    assert ablate(file) == 0
    whole = write("whole", train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    assert ablate(whole) == 0
    assert results(file) == results(whole)


on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found as Linux shows them")


def pids_of_cells(parent: int) -> list[int]:
    """The processes that a runner has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_a_study_killed_again_and_again_equals_one_that_was_not(write, one_thread):
    file, whole = (write(name, train=LONG, measure=[MEASURE], seeds=[1]) for name in ("killed", "whole"))
    command = lambda f: ("-m", "scripts.ablate", f, "--out", f.with_suffix(""))
    assert run_program(*command(whole)).code == 0
    for cell, step in zip(cells_of(file), (30, 60), strict=True):
        started = start_program(*command(file))
        when_at(step, cell.path, started.kill).join()
        assert started.wait(30) == -signal.SIGKILL
        assert RunDir(cell.path).summary() is None
    finished = [cell.path for cell in cells_of(file) if RunDir(cell.path).summary()]
    before = {path: path.stat().st_mtime_ns for run in finished for path in run.rglob("*.safetensors")}
    assert len(finished) == 1
    ended = run_program(*command(file))
    assert ended.code == 0, ended
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert results(file) == results(whole)


@pytest.mark.slow
@on_linux
def test_a_cell_does_not_outlive_a_killed_runner_and_has_saved(write, one_thread):
    file = write(train=LONG | {"max_steps": 4000, "checkpoint_every": 4000}, seeds=[1])
    cell = cells_of(file)[0]
    started = start_program("-m", "scripts.ablate", file, "--out", file.with_suffix(""))
    children: list[int] = []
    when_at(60, cell.path, lambda: (children.extend(pids_of_cells(started.pid)), started.kill())).join()
    started.wait(30)
    assert len(children) == 1
    end = time.monotonic() + 30
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert 60 <= RunDir(cell.path).latest().step == runner.last_step(cell.path) < 4000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_of_several_jobs_saves_all_that_run(write, one_thread, number):
    file = write(train=LONG | {"max_steps": 4000, "checkpoint_every": 4000})
    first, second, *_ = cells_of(file)
    started = start_program("-m", "scripts.ablate", file, "--out", file.with_suffix(""), "--jobs", 2)
    when_at(30, first.path, lambda: when_at(30, second.path, lambda: started.send_signal(number)).join()).join()
    _, err = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert err.endswith("stopped; the same command goes on from there\n")
    for cell in (first, second):
        assert 30 <= RunDir(cell.path).latest().step == runner.last_step(cell.path) < 4000


@on_linux
def test_a_cell_killed_alone_is_a_failure_that_says_so(write, one_thread):
    file = write(train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    (cell,) = cells_of(file)
    kill = lambda: [os.kill(pid, signal.SIGKILL) for pid in pids_of_cells(os.getpid())]
    watcher = when_at(20, cell.path, kill)
    assert ablate(file) == 1
    watcher.join()
    (failure,) = (json.loads(line) for line in (file.with_suffix("") / "failures.jsonl").read_text().splitlines())
    assert (failure["exit_code"], failure["error"]) == (-9, "killed by signal 9")


def test_the_second_word_of_a_scheduler_does_not_break_into_a_save():
    from configs.program import stop_signals

    with stop_signals() as stopped:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped[0] == signal.SIGTERM


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    assert runner.last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert runner.last_step(tmp_path) == 2
    (tmp_path / "metrics.jsonl").write_text('{"ste')
    assert runner.last_step(tmp_path) == 0
