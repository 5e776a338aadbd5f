"""Studies that are stopped or killed lose nothing: real processes."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE_S, run_program, start_program
from studies import MEASURE, ablate, cells_of, results

from artifacts.run_dir import RunDir
from cli.program import stop_signals
from scripts.ablate import runner

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # programs that this process imported

LONG = {"max_steps": 150, "checkpoint_every": 7, "eval_every": 18}


@pytest.fixture
def one_thread(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner, "POLL_S", 0.01)


def when_at(step: int, run: Path, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as the metrics of a run say this step."""

    def watch():
        end = time.monotonic() + PATIENCE_S
        while runner.last_step(run) < step and time.monotonic() < end:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_signal_loses_no_step_and_the_repetition_equals_an_undisturbed_study(write_study, request, capsys):
    file = write_study(train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    (cell,) = cells_of(file)
    watcher = when_at(20, cell.path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ablate(file) == 128 + signal.SIGTERM
    watcher.join()
    assert capsys.readouterr().err.endswith("stopped; the same command resumes from there\n")
    run = RunDir(cell.path)
    assert 20 <= run.latest().step == run.metrics()[-1]["step"] < 150
    assert not (file.with_suffix("") / "failures.jsonl").exists()
    request.getfixturevalue("in_this_process")
    assert ablate(file) == 0
    whole = write_study("whole", train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    assert ablate(whole) == 0
    assert results(file) == results(whole)


on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found as Linux shows them")


def pids_of_cells(parent: int) -> list[int]:
    """The processes that a runner has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_a_study_killed_again_and_again_equals_one_that_was_not(write_study, one_thread):
    file, whole = (write_study(name, train=LONG, measure=[MEASURE], seeds=[1]) for name in ("killed", "whole"))
    command = lambda f: ("-m", "scripts.ablate", f, "--out", f.with_suffix(""))
    assert run_program(*command(whole)).code == 0
    for cell, step in zip(cells_of(file), (30, 60), strict=True):
        started = start_program(*command(file))
        when_at(step, cell.path, started.kill).join()
        assert started.wait(PATIENCE_S) == -signal.SIGKILL
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
def test_a_cell_does_not_outlive_a_killed_runner_and_has_saved(write_study, one_thread):
    file = write_study(train=LONG | {"max_steps": 4000, "checkpoint_every": 4000}, seeds=[1])
    cell = cells_of(file)[0]
    started = start_program("-m", "scripts.ablate", file, "--out", file.with_suffix(""))
    children: list[int] = []
    when_at(60, cell.path, lambda: (children.extend(pids_of_cells(started.pid)), started.kill())).join()
    started.wait(PATIENCE_S)
    assert len(children) == 1
    end = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert 60 <= RunDir(cell.path).latest().step == runner.last_step(cell.path) < 4000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_of_several_jobs_saves_all_that_run(write_study, one_thread, number):
    file = write_study(train=LONG | {"max_steps": 4000, "checkpoint_every": 4000})
    first, second, *_ = cells_of(file)
    started = start_program("-m", "scripts.ablate", file, "--out", file.with_suffix(""), "--jobs", 2)
    when_at(30, first.path, lambda: when_at(30, second.path, lambda: started.send_signal(number)).join()).join()
    _, err = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 128 + number
    assert err.endswith("stopped; the same command resumes from there\n")
    for cell in (first, second):
        assert 30 <= RunDir(cell.path).latest().step == runner.last_step(cell.path) < 4000


@pytest.mark.slow
@on_linux
def test_a_cell_killed_alone_is_a_failure_that_says_so(write_study, one_thread):
    file = write_study(train=LONG, seeds=[1], variants={"wide": {"model": {"window": 9}}})
    (cell,) = cells_of(file)
    kill = lambda: [os.kill(pid, signal.SIGKILL) for pid in pids_of_cells(os.getpid())]
    watcher = when_at(20, cell.path, kill)
    assert ablate(file) == 1
    watcher.join()
    (failure,) = (json.loads(line) for line in (file.with_suffix("") / "failures.jsonl").read_text().splitlines())
    assert (failure["exit_code"], failure["error"]) == (-9, "killed by signal 9")


def test_the_second_word_of_a_scheduler_does_not_break_into_a_save():
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
