"""Processes that are killed or told to stop while they train together: real ones, started by torchrun."""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE_S, Ended, command_line, run_config, start_program

import train
from artifacts.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("unmeasured")

STEPS = 60
RUN = {
    "optim": {"optimizer": "adamw", "adamw_lr": 1e-2},
    "train": {"max_steps": STEPS, "checkpoint_every": 8, "eval_every": 20},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> RunDir:
    """The run of one process that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        return RunDir(train.run(run_config(tmp_path_factory.mktemp("whole"), text, **RUN)).path)


@contextmanager
def torchrun(out: Path, text: Path, *options: object, **changes) -> Iterator[subprocess.Popen[str]]:
    """Two processes that train; whatever is left of them ends with the block."""
    values = {key: RUN[key] | changes.get(key, {}) for key in RUN}
    line = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options, "train.py")
    process = start_program(*line, *command_line(out, text, **values))
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for member in family:
            kill(member)


def wait_for_step(process: subprocess.Popen[str], run: RunDir, step: int) -> None:
    """Until the metrics say it."""
    metrics, end = run.path / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those that train and have not ended."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):  # or a zombie: it has ended since it was listed
                found += [child] if "train.py" in child.cmdline() else []
    return found


def kill(process: psutil.Process) -> None:
    """Unless it has ended."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def end_of(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err)


def assert_went_on(run: RunDir, whole: RunDir) -> None:
    """It is finished, and has the losses of the undisturbed run."""
    a, b = run.metrics(), whole.metrics()
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, STEPS + 1))
    assert max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in ("train_loss", "val_loss") if k in x) < 1e-4
    assert run.summary()["step"] == STEPS


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint_when_a_process_was_killed(tmp_path, text, whole):
    run = RunDir(tmp_path / "run")
    with torchrun(tmp_path, text, "--max-restarts", 1) as process:
        wait_for_step(process, run, 20)
        one, other = workers(process)
        kill(one)
        ended = end_of(process)
        assert not other.is_running()
    assert ended.code == 0, ended.err
    assert "resuming from step" in ended.out
    assert_went_on(run, whole)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_another_number_of_them_goes_on(tmp_path, text, whole):
    run = RunDir(tmp_path / "run")
    with torchrun(tmp_path, text, train={"parallel": "fsdp", "checkpoint": "sharded"}) as process:
        wait_for_step(process, run, 20)
        one, other = workers(process)
        kill(other)
        ended = end_of(process)
        assert ended.code != 0
        assert not one.is_running()
    assert run.summary() is None
    assert 16 <= run.latest().step < STEPS
    train.run(run_config(tmp_path, text, **RUN))
    assert_went_on(run, whole)


def test_a_stopped_torchrun_saves_and_one_process_goes_on_from_there(tmp_path, text, whole):
    run = RunDir(tmp_path / "run")
    with torchrun(tmp_path, text) as process:
        wait_for_step(process, run, 20)
        process.send_signal(signal.SIGTERM)
        ended = end_of(process)
    assert ended.code != 0
    step = run.latest().step
    assert 20 <= step < STEPS
    assert f"stopped at step {step}; the same command resumes from there\n" in ended.err
    assert run.metrics()[-1]["step"] == step
    train.run(run_config(tmp_path, text, **RUN))
    assert_went_on(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("checkpoint", ["whole", "sharded"])
def test_processes_killed_again_and_again_at_any_moment_arrive(tmp_path, text, whole, parallel, checkpoint):
    draw, run = random.SystemRandom(), RunDir(tmp_path / "run")
    how = {"train": {"parallel": parallel, "checkpoint": checkpoint}}
    for _ in range(4):
        with torchrun(tmp_path, text, **how) as process:
            done = run.metrics()[-1]["step"] if (run.path / "metrics.jsonl").exists() and run.metrics() else 0
            end = time.monotonic() + draw.uniform(2, 12)
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.01)
            for worker in draw.sample(found := workers(process), k=min(1, len(found))):
                kill(worker)
            end_of(process)
            assert done <= STEPS
    with torchrun(tmp_path, text, **how) as process:
        ended = end_of(process)
    assert ended.code == 0, ended.err
    assert_went_on(run, whole)
