"""A full disk ends a run in one line, damages nothing, and the same command goes on when there is room."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from conftest import command_line, run_program
from safetensors import SafetensorError
from training_runs import losses

import train
from artifacts import checkpoint
from artifacts import safetensors_io as tensors
from artifacts.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("unmeasured")

FULL = {
    "fsync": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "save_file": lambda: SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("call", [3, 5, 9])
@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(
    tmp_path, text, program, trained, monkeypatch, where, call
):
    arguments = command_line(tmp_path, text)
    owner = {"fsync": os, "save_file": tensors}[where]
    original, calls = getattr(owner, where), iter(range(1, 1000))

    def full(*args):
        if next(calls) >= call:
            raise FULL[where]()
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, full)
        ended = program(train.main, *arguments, name="train.py")
    ended.assert_refused("train.py: ", "No space left on device")
    for path in checkpoint.list_steps(tmp_path / "run" / "checkpoints"):
        checkpoint.read(path)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    assert program(train.main, *arguments).code == 0
    assert losses(RunDir(tmp_path / "run")) == losses(trained())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of the size asked for, where one can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kib: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kib}k", *options]), "tmpfs", str(place)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("no file system can be mounted here")
        return place

    yield resize
    while os.path.ismount(place) and subprocess.run(["umount", str(place)]).returncode == 0:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("kib", [8, 16, 40, 80, 120, 160, 200, 240, 320, 400, 480])
def test_a_disk_that_is_really_full_is_one_line_and_the_same_command_goes_on(text, small_disk, trained, kib):
    disk = small_disk(kib)
    arguments = ["train.py", *command_line(disk, text, train={"max_steps": 40, "checkpoint_every": 2})]
    ended = run_program(*arguments)
    ended.assert_refused("train.py: ", "No space left on device")
    for path in checkpoint.list_steps(disk / "run" / "checkpoints"):
        checkpoint.read(path)
    small_disk(8192, "remount")
    assert run_program(*arguments).code == 0
    assert losses(RunDir(disk / "run")) == losses(trained(train={"max_steps": 40, "checkpoint_every": 2}))
