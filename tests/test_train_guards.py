"""A run stops by itself: at too many bad steps, or when it no longer gets better; overfitting is reported."""

import math

import pytest
from conftest import command_line
from training_runs import content, evaluations_find, losses

import train
from artifacts.run_dir import RunDir
from data.loader import TrainLoader
from data.prepare import prepare
from model.gpt import GPT

pytestmark = pytest.mark.usefixtures("unmeasured")

# Bad steps are skipped and counted, and stop it when they are too many.


@pytest.fixture
def losing(monkeypatch):
    """In these passes, counted from 1, the loss or its gradient is multiplied by `value`."""

    def spoil(passes: range, value: float, *, gradient: bool = False) -> None:
        forward, calls = GPT.forward, iter(range(1, 1000))

        def spoiled(self, idx, targets=None, *args, **kwargs):
            loss = forward(self, idx, targets, *args, **kwargs)
            if not self.training or next(calls) not in passes:
                return loss
            if gradient:
                loss.register_hook(lambda grad: grad * value)
                return loss
            return loss * value

        monkeypatch.setattr(GPT, "forward", spoiled)

    return spoil


CONSTANT = {"optim": {"schedule": "constant"}}


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_no_numbers_stop_it_with_the_weights_of_the_step_before(
    tmp_path, text, program, trained, losing, value, gradient
):
    whole = trained("whole", train={"max_steps": 4}, **CONSTANT)
    losing(range(5, 100), value, gradient=gradient)
    ended = program(train.main, *command_line(tmp_path, text, **CONSTANT), name="train.py")
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("train.py: step 5: the loss is ")
    assert "train.max_skipped = 5" in ended.err
    run = RunDir(tmp_path / "run")
    assert run.latest().step == 8
    assert run.summary() is None
    assert [line["skipped_steps"] for line in run.metrics()] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert ["train_loss" in line for line in run.metrics()] == [True] * 4 + [False] * 5
    name = "model.safetensors"
    assert (run.latest().path / name).read_bytes() == (whole.latest().path / name).read_bytes()


def test_no_step_need_be_skipped_before_it_stops(trained, losing):
    losing(range(7, 100), math.nan)
    with pytest.raises(train.DivergedError, match=r"^step 7: the loss is nan"):
        trained(train={"max_skipped": 0})


def test_the_rows_that_stop_it_are_named_with_their_place_in_the_text(trained, losing, text):
    losing(range(17, 18), math.inf)  # three passes a step: the second of the sixth
    with pytest.raises(train.DivergedError) as error:
        trained(train={"micro_batch": 2, "max_skipped": 0})
    tokens = prepare(str(text), "byte", root=text.parent / "prepared", progress=False).split("train")
    one, two = TrainLoader(tokens, block_size=16, global_rows=6, seed=1337).starts(5, range(2, 4))
    where = f"loss is highest in rows 2 to 3 of the batch, which begin at tokens {one}, {two} of {tokens.path};"
    assert str(error.value).startswith("step 6: the loss is inf, the norm of its gradient ")
    assert where in str(error.value)


def test_a_bad_step_is_skipped_and_counted_and_the_run_goes_on(trained, losing):
    losing(range(5, 6), math.nan, gradient=True)
    run = trained(train={"log_every": 4, "eval_every": 100})
    assert [line["skipped_steps"] for line in run.metrics()] == [0, 1, 1]
    assert run.summary()["train_loss"] < losses(run)[0]


def test_a_spike_is_skipped_unless_it_is_not_asked_for(trained, losing):
    losing(range(80, 81), 30.0)
    rare = {"max_steps": 90, "log_every": 30, "eval_every": 90, "checkpoint_every": 90}
    assert trained("guarded", train=rare).summary()["skipped_steps"] == 1
    losing(range(80, 81), 30.0)
    assert trained("unguarded", train=rare | {"spike_sigma": "none"}).summary()["skipped_steps"] == 0


# It stops by itself when it no longer gets better, and reports overfitting.


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluations find these losses."""

    return lambda *losses: evaluations_find(monkeypatch, *losses)


def test_patience_ends_a_run_and_the_best_checkpoint_is_kept(trained, evaluated, capsys):
    evaluated(3.0, 1.0, 2.0, 1.5, 0.5)
    run = trained(train={"eval_every": 2, "patience": 2})
    assert (run.summary()["step"], run.summary()["best_val_loss"]) == (8, 1.0)
    assert [run.checkpoint(which).step for which in ("best", "latest")] == [4, 8]
    said = "ended at step 8: 2 evaluations in a row were no better than 1.0000 (train.patience)\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_run_that_patience_ended_is_finished_and_more_patience_extends_it(trained, evaluated, capsys):
    evaluated(3.0, 1.0, 2.0, 1.5)
    run = trained(train={"eval_every": 2, "patience": 2})
    before = content(run.path)
    trained(train={"eval_every": 2, "patience": 2})
    assert content(run.path) == before
    assert "is finished at step 8: --train.patience extends it" in capsys.readouterr().out
    evaluated(0.8, 0.9)
    assert trained(train={"eval_every": 2, "patience": 3}).summary()["step"] == 12
    assert run.summary()["best_val_loss"] == 0.8


def test_a_run_that_gets_better_in_time_is_not_ended(trained, evaluated):
    evaluated(3.0, 3.1, 2.9, 3.1, 2.8, 2.9)
    assert trained(train={"eval_every": 2, "patience": 2}).summary()["step"] == 12


def test_that_validation_rises_while_training_falls_is_said_once(trained, evaluated, capsys):
    evaluated(3.0, 3.05, 3.2, 3.5)
    trained(train={"eval_every": 3}, optim={"warmup_steps": 2})
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said.startswith("note: step 9: validation loss rose from 3.0000 to 3.2000 while training loss fell from 5.4")
    assert "--train.patience" in said


def test_that_both_rise_is_no_overfitting(trained, evaluated, capsys):
    evaluated(3.0, 3.05, 3.2, 3.5)
    trained(train={"eval_every": 3, "log_every": 3}, optim={"muon_lr": 1e-9, "adamw_lr": 1e-9})
    assert "note: step" not in capsys.readouterr().err
