"""Checkpoints of a run: which stay, which is gone on from, and what is written beside the training."""

import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from artifacts import checkpoint
from artifacts.background import Background
from artifacts.run_dir import RunDir
from model.errors import UserError
from training.optim import Optimizers


def tiny_training() -> tuple[torch.nn.Module, Optimizers]:
    model = torch.nn.Linear(3, 2)
    return model, Optimizers([torch.optim.SGD(model.parameters())])


def save_steps(run: RunDir, steps: dict[int, bool], **how) -> None:
    """Checkpoints of these steps, the best so far or not."""
    for step, best in steps.items():
        run.save(*tiny_training(), {"step": step}, best=best, **how)


def kept(run: RunDir) -> list[int]:
    return [checkpoint.read(path).step for path in checkpoint.list_steps(run.checkpoints)]


# Checkpoints: the best and the newest two.


def test_pruning_keeps_the_best_and_the_newest_two(begun):
    save_steps(begun, {10: True, 20: True, 30: False, 40: False, 50: False})
    assert kept(begun) == [20, 40, 50]
    assert (begun.checkpoint("best").step, begun.checkpoint("latest").step) == (20, 50)


def test_as_many_stay_as_are_asked_for(begun):
    save_steps(begun, {10: True, 20: False, 30: False, 40: False, 50: False}, keep=3)
    assert kept(begun) == [10, 30, 40, 50]


def test_a_best_that_is_new_needs_no_room_of_its_own(begun):
    save_steps(begun, {10: True, 20: False, 30: True})
    assert kept(begun) == [20, 30]
    assert begun.checkpoint("best").step == begun.latest().step == 30


def test_without_a_best_there_is_a_latest(begun):
    save_steps(begun, {10: False})
    assert begun.latest().step == 10
    with pytest.raises(UserError) as error:
        begun.checkpoint("best")
    what = "it was not evaluated before it stopped; take --checkpoint latest"
    assert str(error.value) == f"{begun.path} has no best checkpoint yet: {what}"


def test_a_pointer_that_is_no_text_is_said(begun):
    save_steps(begun, {10: True})
    (begun.checkpoints / "best").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="best points to '��', which is gone: write the name of another"):
        begun.checkpoint()


def test_a_latest_that_is_gone_is_said_and_not_begun_anew(begun):
    save_steps(begun, {10: True})
    checkpoint.remove(begun.path / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match=r"latest points to 'step_00000010', which is gone: write the name of another"):
        begun.latest()


def damage(run: RunDir, step: int) -> Path:
    """One bit of the weights flips."""
    file = run.checkpoints / f"step_{step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    return file


def test_a_damaged_latest_is_said_and_the_one_before_it_taken(begun):
    save_steps(begun, {10: True, 20: False})
    file, said = damage(begun, 20), []
    assert begun.resume_from(said.append).step == 10
    why = f"{file} is missing or damaged: its bytes are not those that were written"
    assert said == [f"note: {why}; {begun.checkpoints / 'step_00000010'}, which is whole, is taken instead"]


def test_a_pointer_that_is_damaged_costs_nothing(begun):
    save_steps(begun, {10: True, 20: False})
    (begun.checkpoints / "latest").write_bytes(b"\xff")
    assert begun.resume_from(lambda text: None).step == 20


def test_where_all_checkpoints_are_damaged_the_newest_is_named(begun):
    save_steps(begun, {10: True, 20: False})
    damage(begun, 10)
    file = damage(begun, 20)
    with pytest.raises(UserError) as error:
        begun.resume_from(lambda text: None)
    assert str(error.value) == (
        f"{file} is missing or damaged: its bytes are not those that were written; no other checkpoint is whole: "
        f"remove {begun.path} to begin again, or give another --name"
    )


def test_whole_checkpoints_are_quietly_taken(begun):
    said: list[str] = []
    assert begun.resume_from(said.append) is None
    save_steps(begun, {10: True, 20: False})
    assert begun.resume_from(said.append).step == 20
    assert said == []


def test_what_came_after_the_checkpoint_taken_goes(begun):
    save_steps(begun, {5: True, 10: False, 15: False}, keep=3)
    damage(begun, 15)
    begun.discard_checkpoints_after(begun.resume_from(lambda text: None))
    assert kept(begun) == [5, 10]
    save_steps(begun, {12: False})
    assert kept(begun) == [5, 10, 12]


def test_a_failed_removal_of_old_ones_leaves_no_damaged_checkpoint_in_use(begun, monkeypatch):
    save_steps(begun, {10: False, 20: False})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: None)
        save_steps(begun, {30: False})
    assert begun.latest().step == 30
    save_steps(begun, {40: False})
    assert kept(begun) == [30, 40]


def test_a_path_is_the_run_or_one_of_its_checkpoints(begun):
    save_steps(begun, {5: True})
    for path in (begun.path, begun.checkpoints / "step_00000005"):
        assert RunDir.of(path).path == begun.path


def test_where_there_is_no_room_nothing_is_written_and_it_is_said(begun, monkeypatch):
    n_bytes = checkpoint.content(*tiny_training()).nbytes
    usage = lambda free: lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", usage(n_bytes - 1))
    with pytest.raises(UserError, match=r"No space left on device: .* MB free and a checkpoint takes 0\.\d: make room"):
        save_steps(begun, {10: True})
    assert list(begun.checkpoints.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", usage(n_bytes))
    save_steps(begun, {10: True})
    assert kept(begun) == [10]


# In the background.


def test_what_is_trained_while_a_checkpoint_is_written_does_not_change_it(begun, monkeypatch):
    write, go_on = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *args, **kwargs: go_on.wait(60) and write(*args, **kwargs))
    (model, optimizers), background = tiny_training(), Background()
    before = model.weight.detach().clone()
    begun.save(model, optimizers, {"step": 10}, best=True, background=background)
    with torch.no_grad():
        model.weight += 1
    assert kept(begun) == []
    go_on.set()
    background.close()
    assert kept(begun) == [10]
    checkpoint.load_model(model, begun.latest())
    assert torch.equal(model.weight, before)


def test_a_failure_in_the_background_is_raised_by_the_next_save(begun, monkeypatch):
    background = Background()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
        begun.save(*tiny_training(), {"step": 10}, best=True, background=background)
        with pytest.raises(OSError, match="full"):
            begun.save(*tiny_training(), {"step": 20}, best=True, background=background)
    begun.save(*tiny_training(), {"step": 30}, best=True, background=background)
    background.close()
    assert kept(begun) == [30]


def test_a_failure_in_the_background_is_raised_by_a_look_at_it():
    background = Background()
    background.check()
    background.start(lambda: None)
    background.close()
    background.check()
    background, go_on = Background(), threading.Event()
    background.start(lambda: go_on.wait(60) and 1 / 0)
    background.check()  # it is still under way
    go_on.set()
    wait([background._last])
    with pytest.raises(ZeroDivisionError):
        background.check()
