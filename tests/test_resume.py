"""A run that was stopped, killed or cut short, and repeated, equals one that never was: bit for bit."""

import errno
import os
import signal
from concurrent.futures import wait
from pathlib import Path

import pytest
from conftest import command_line, run_config
from training_runs import assert_same

import train
from artifacts import checkpoint, run_dir
from artifacts.background import Background
from artifacts.metrics import Metrics
from artifacts.run_dir import RunDir
from configs.schema import RunConfig
from data.tokenizer import Tokenizer
from model import memory
from training import trainer


class Killed(BaseException):
    """Ends a run as kill -9 would, as far as a test in one process can."""


def fail_at(
    patch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException, *, after: bool
) -> None:
    """Raise before or after one call of a function."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        due = next(calls) == call
        if due and not after:
            raise error
        result = original(*args, **kwargs)
        if due:
            raise error
        return result

    patch.setattr(owner, name, wrapped)


def cut_short(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, owner: object, name: str, call: int, *, after: bool
) -> None:
    """Begin a run, or go on with it, and end it as kill -9 would."""
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, Killed(), after=after)
        with pytest.raises(Killed):
            train.run(config)


DROPOUT = {"model": {"dropout": 0.2}, "train": {"log_every": 3}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> Path:
    """The run with dropout that nobody disturbed."""
    config = run_config(tmp_path_factory.mktemp("whole"), text, **DROPOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda runtime: 1e12)
        train.run(config)
    return config.path


# Cut short anywhere in one process.

PLACES = {
    "as a step begins": (train.Trainer, "step", False),
    "after a step": (train.Trainer, "step", True),
    "after an evaluation": (trainer, "evaluate", True),
    "as a line is written": (Metrics, "write", False),
    "after a line": (Metrics, "write", True),
    "as a checkpoint is saved": (RunDir, "save", False),
    "before the checkpoint is pointed to": (checkpoint, "point", False),
    "after it is pointed to": (checkpoint, "point", True),
    "as an old one is removed": (checkpoint, "remove", False),
    "after a checkpoint": (RunDir, "save", True),
}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_cut_short_and_repeated_equals_one_that_never_was(tmp_path, text, whole, monkeypatch, place, call):
    config = run_config(tmp_path, text, **DROPOUT)
    owner, name, after = PLACES[place]
    cut_short(monkeypatch, config, owner, name, call, after=after)
    train.run(config)
    assert_same(config.path, whole)


ENDS = {
    "before it is begun": (RunDir, "begin", False),
    "after it is begun": (RunDir, "begin", True),
    "while its directory is made": (run_dir, "write_json", False),
    "before its tokenizer is saved": (Tokenizer, "save", False),
    "before its summary": (RunDir, "finish", False),
}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("place", ENDS)
def test_a_run_cut_short_at_its_ends_and_repeated_equals_one_that_never_was(tmp_path, text, whole, monkeypatch, place):
    config = run_config(tmp_path, text, **DROPOUT)
    owner, name, after = ENDS[place]
    cut_short(monkeypatch, config, owner, name, 1, after=after)
    train.run(config)
    assert_same(config.path, whole)


def test_a_run_that_measures_speed_and_memory_resumes_exactly_too(tmp_path, text, monkeypatch):
    config, undisturbed = (run_config(tmp_path, text, name, **DROPOUT) for name in ("run", "undisturbed"))
    train.run(undisturbed)
    cut_short(monkeypatch, config, train.Trainer, "step", 7, after=False)
    train.run(config)
    assert_same(config.path, undisturbed.path)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_cut_short_again_and_again_arrives(tmp_path, text, whole, monkeypatch):
    config = run_config(tmp_path, text, **DROPOUT)
    for call in (6, 3, 5, 2):
        cut_short(monkeypatch, config, train.Trainer, "step", call, after=True)
    train.run(config)
    assert_same(config.path, whole)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_goes_on_and_says_from_where(tmp_path, text, monkeypatch, capsys):
    config = run_config(tmp_path, text)
    cut_short(monkeypatch, config, train.Trainer, "step", 11, after=True)
    steps: list[int] = []
    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self, x: (steps.append(self.progress.step), step(self, x)))
    train.run(config)
    assert "resuming from step 10" in capsys.readouterr().out
    assert steps == [10, 11]


@pytest.mark.usefixtures("unmeasured")
def test_lines_after_the_checkpoint_are_cut_as_the_run_goes_on(tmp_path, text, monkeypatch):
    config = run_config(tmp_path, text)
    for call, lines in ((8, 7), (3, 7)):
        cut_short(monkeypatch, config, train.Trainer, "step", call, after=False)
        assert [line["step"] for line in RunDir(config.path).metrics()] == list(range(1, lines + 1))


@pytest.mark.usefixtures("unmeasured")
def test_a_run_may_be_finished_in_fewer_steps_than_it_was_begun_for(tmp_path, text, monkeypatch):
    constant = {"optim": {"schedule": "constant"}, "train": {"max_steps": 12}}
    cut_short(monkeypatch, run_config(tmp_path, text, **constant), train.Trainer, "step", 11, after=True)
    result = train.run(run_config(tmp_path, text, optim=constant["optim"], train={"max_steps": 10}))
    assert result.step == result.summary["step"] == 10


@pytest.mark.usefixtures("unmeasured")
def test_another_micro_batch_may_go_on_with_a_run(tmp_path, text, monkeypatch):
    config = run_config(tmp_path, text, train={"micro_batch": 6})
    cut_short(monkeypatch, config, train.Trainer, "step", 7, after=False)
    train.run(run_config(tmp_path, text, train={"micro_batch": 2}))
    train.run(run_config(tmp_path, text, "undisturbed", train={"micro_batch": 6}))
    one, other = ([x["train_loss"] for x in RunDir(tmp_path / n).metrics()] for n in ("run", "undisturbed"))
    assert one == pytest.approx(other, rel=1e-4)


# Signals, in this process.


def stop_at(patch: pytest.MonkeyPatch, call: int, number: int, times: int = 1) -> None:
    """A signal that arrives in the middle of a step."""
    update, calls = train.Trainer._update, iter(range(1, 1000))

    def interrupted(self, step):
        if next(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return update(self, step)

    patch.setattr(train.Trainer, "_update", interrupted)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("call", [1, 5, 7, 8])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_goes_on_as_if_it_had_not(tmp_path, text, whole, monkeypatch, capsys, call, number):
    config = run_config(tmp_path, text, **DROPOUT)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, call, number)
        result = train.run(config)
    assert (result.stopped_by, result.step) == (number, call)
    assert result.summary is None
    assert capsys.readouterr().err == f"stopped at step {call}; the same command resumes from there\n"
    assert RunDir(config.path).latest().step == call
    assert signal.getsignal(number) == before
    assert train.run(config).stopped_by is None
    assert_same(config.path, whole)


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_in_the_last_step_loses_nothing(tmp_path, text, whole, monkeypatch):
    config = run_config(tmp_path, text, **DROPOUT)
    with monkeypatch.context() as patch:
        stop_at(patch, 12, signal.SIGTERM)
        train.run(config)
    train.run(config)
    assert_same(config.path, whole)


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_after_a_step_saves_that_step(tmp_path, text, monkeypatch):
    write, lines = Metrics.write, iter(range(1, 1000))
    late = lambda self, line: (write(self, line), next(lines) == 7 and os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(Metrics, "write", late)
    assert train.run(run_config(tmp_path, text)).step == 7
    assert RunDir(tmp_path / "run").latest().step == 7


@pytest.mark.usefixtures("unmeasured")
def test_a_second_signal_stops_at_once(tmp_path, text, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        train.run(run_config(tmp_path, text))
    assert RunDir(tmp_path / "run").metrics()[-1]["step"] == 2


@pytest.mark.usefixtures("unmeasured")
def test_a_run_outside_the_main_thread_works_without_signals(tmp_path, text):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(train.run, run_config(tmp_path, text)).result()
    assert result.summary["step"] == 12


# What is damaged is said: an older checkpoint is taken, and where there is none, nothing changes.

DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "missing": lambda file: file.unlink(),
}


@pytest.fixture
def stopped(tmp_path, text, monkeypatch, unmeasured) -> RunConfig:
    """A run stopped at step 6 of 12, with checkpoints of 5 and 6."""
    config = run_config(tmp_path, text, **DROPOUT)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, signal.SIGTERM)
        train.run(config)
    return config


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken_and_nothing_is_lost(stopped, whole, capsys, damage, name):
    newest = stopped.path / "checkpoints" / "step_00000006"
    DAMAGES[damage](newest / name)
    train.run(stopped)
    said = capsys.readouterr()
    assert said.err.startswith(f"note: {newest}")
    assert said.err.endswith("step_00000005, which is whole, is taken instead\n")
    assert "resuming from step 5\n" in said.out
    assert_same(stopped.path, whole)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_checkpoints_are_damaged_it_is_one_line_and_nothing_changes(
    tmp_path, text, program, stopped, damage, name
):
    steps = checkpoint.list_steps(stopped.path / "checkpoints")
    for path in steps:
        DAMAGES[damage](path / name)
    times = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    before = times()
    ended = program(train.main, *command_line(tmp_path, text, **DROPOUT), name="train.py")
    ended.assert_refused("train.py: ", str(steps[-1] / name if "safetensors" in name else steps[-1]))
    assert times() == before


@pytest.mark.usefixtures("unmeasured")
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(tmp_path, text, monkeypatch):
    begin, full = Background.start, OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "write", lambda *args, **kwargs: (_ for _ in ()).throw(full))
    monkeypatch.setattr(Background, "start", lambda self, job: (begin(self, job), wait([self._last])))
    with pytest.raises(OSError, match="No space left on device"):
        train.run(run_config(tmp_path, text, train={"checkpoint_every": 4, "eval_every": 12}))
    assert RunDir(tmp_path / "run").metrics()[-1]["step"] == 5  # of 12; checkpoints are at 4 and 8


def test_a_run_that_is_trained_by_another_process_is_refused(tmp_path, text, program, stopped):
    with RunDir(stopped.path).locked():
        ended = program(train.main, *command_line(tmp_path, text, **DROPOUT), name="train.py")
    ended.assert_refused(f"train.py: {stopped.path} is trained by another process now")
    assert RunDir(stopped.path).latest().step == 6


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_config_is_refused_in_one_line(tmp_path, text, program, stopped, content):
    (stopped.path / "config.json").write_text(content)
    program(train.main, *command_line(tmp_path, text)).assert_refused(str(stopped.path / "config.json"))


def test_peaks_are_measured_again_after_a_resume(tmp_path, text, stopped, monkeypatch):
    monkeypatch.setattr(trainer, "measure_peak", memory.measure_peak)
    summary = train.run(stopped).summary
    assert summary["peak_memory_train_bytes"] > summary["peak_memory_eval_bytes"] > 0
