"""Bookkeeping of auxiliary losses: averaged, saved, and reported as aux_NAME in the metrics."""

import math
from itertools import pairwise

import pytest
from conftest import run_config
from training_runs import assert_same

import train
from artifacts.run_dir import RunDir
from model.gpt import GPT
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture
def passes(monkeypatch) -> list[float]:
    """Networks report an auxiliary loss `mean_token`, the mean of their input; its values in all training passes."""
    forward, seen = GPT.forward, []

    def with_auxiliary(self, idx, targets=None, *args, auxiliary=None, **kwargs):
        if auxiliary is not None:
            auxiliary.values["mean_token"] = idx.float().mean()
            seen.append(idx.float().mean().item())
        return forward(self, idx, targets, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", with_auxiliary)
    return seen


def reported(run: RunDir) -> list[float | None]:
    return [line.get("aux_mean_token") for line in run.metrics()]


def test_a_network_without_auxiliary_losses_reports_none(trained):
    assert not [key for line in trained().metrics() for key in line if key.startswith("aux_")]


def test_a_line_has_the_mean_over_micro_batches_and_steps(passes, trained):
    run = trained(train={"micro_batch": 2, "log_every": 4, "eval_every": 5})
    assert len(passes) == 3 * 12  # evaluations ask for none
    ends = [3 * step for step in (0, 4, 5, 8, 10, 12)]
    assert reported(run) == pytest.approx([sum(passes[a:b]) / (b - a) for a, b in pairwise(ends)], rel=1e-6)


def test_a_skipped_step_does_not_count(passes, trained, monkeypatch):
    losing, calls = GPT.forward, iter(range(1, 1000))

    def once(self, *args, **kwargs):
        loss = losing(self, *args, **kwargs)
        return loss * math.nan if self.training and next(calls) == 2 else loss

    monkeypatch.setattr(GPT, "forward", once)
    run = trained(train={"log_every": 3, "eval_every": 12})
    assert run.metrics()[0]["skipped_steps"] == 1
    assert reported(run)[0] == pytest.approx((passes[0] + passes[2]) / 2, rel=1e-6)


def test_a_run_cut_between_two_lines_reports_what_one_that_never_was_does(passes, tmp_path, text, monkeypatch):
    every = {"train": {"log_every": 5, "eval_every": 12, "checkpoint_every": 4}}
    config, undisturbed = (run_config(tmp_path, text, name, **every) for name in ("run", "undisturbed"))
    train.run(undisturbed)
    step, calls = Trainer.step, iter(range(1, 1000))

    def cut_short(self, batches):
        if next(calls) == 8:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
    saved = RunDir(config.path).latest()
    assert saved.step == 4
    assert saved.state["progress"]["auxiliary_sums"]["mean_token"] == pytest.approx(sum(passes[12:16]), rel=1e-6)
    train.run(config)
    assert_same(config.path, undisturbed.path)
    assert reported(RunDir(config.path)) == reported(RunDir(undisturbed.path))
    assert None not in reported(RunDir(config.path))
