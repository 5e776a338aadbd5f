"""Real processes that are killed or told to stop, and repeated, equal one that never was: bit for bit."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PATIENCE_S, Ended, command_line, run_config, run_program, start_program
from training_runs import assert_same

import train
from artifacts.run_dir import RunDir

LONG = {"model": {"dropout": 0.1}, "train": {"max_steps": 110, "checkpoint_every": 7, "eval_every": 18}}


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory, text) -> Path:
    """110 steps in a process that nobody disturbed."""
    out = tmp_path_factory.mktemp("long")
    ended = run_program("train.py", *command_line(out, text, **LONG))
    assert ended.code == 0, ended
    return out / "run"


def n_lines(out: Path) -> int:
    """How many lines of metrics the run has, the last one finished or not."""
    metrics = out / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def started(out: Path, text: Path, lines: int, **values) -> subprocess.Popen[str]:
    """The process as soon as its metrics have so many lines."""
    process, end = start_program("train.py", *command_line(out, text, **values)), time.monotonic() + PATIENCE_S
    while n_lines(out) < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.001)
    return process


def signalled(out: Path, text: Path, number: int, lines: int) -> Ended:
    """The process that got a signal as soon as its metrics had so many lines."""
    process = started(out, text, lines, **LONG)
    process.send_signal(number)
    out_text, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out_text, err)


@pytest.mark.slow
def test_a_killed_process_and_its_repetition_equal_one_that_was_not_killed(tmp_path, text, long_whole):
    step = random.SystemRandom().randrange(45, 65)  # of 110: any moment will do
    killed = signalled(tmp_path, text, signal.SIGKILL, step)
    assert killed.code == -signal.SIGKILL
    assert RunDir(tmp_path / "run").summary() is None
    repeated = run_program("train.py", *command_line(tmp_path, text, **LONG))
    assert repeated.code == 0, repeated
    assert "resuming from step" in repeated.out
    assert_same(tmp_path / "run", long_whole)


@pytest.mark.slow
def test_a_process_killed_at_thirty_random_moments_equals_one_that_was_not(tmp_path, text):
    longer = LONG | {"train": {"max_steps": 6000, "checkpoint_every": 11, "eval_every": 180, "log_every": 10}}
    draw = random.SystemRandom()
    for _ in range(30):
        process = started(tmp_path, text, n_lines(tmp_path) + 1, **longer)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert RunDir(tmp_path / "run").summary() is None
    for out in (tmp_path, tmp_path / "undisturbed"):
        ended = run_program("train.py", *command_line(out, text, **longer))
        assert ended.code == 0, ended
    assert_same(tmp_path / "run", tmp_path / "undisturbed" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_process_says_how_to_go_on_and_does(tmp_path, text, long_whole, number, code):
    ended = signalled(tmp_path, text, number, 50)
    assert ended.code == code
    latest = RunDir(tmp_path / "run").latest().step
    assert ended.err == f"stopped at step {latest}; the same command resumes from there\n"
    assert 50 <= latest < 110
    train.run(run_config(tmp_path, text, **LONG))
    assert_same(tmp_path / "run", long_whole)
