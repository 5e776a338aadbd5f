"""Training: it learns, and its batches and evaluations are what they should be."""

import math
import shutil

import pytest
from training_runs import content, losses

from data.loader import TrainLoader

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.mark.parametrize("optim", [{}, {"optimizer": "adamw", "adamw_lr": 1e-2}], ids=["muon", "adamw"])
def test_the_loss_falls_on_sentences(trained, optim):
    run = trained(optim=optim | {"warmup_steps": 5}, train={"max_steps": 80})
    assert losses(run)[0] == pytest.approx(math.log(257), rel=0.1)
    assert sum(losses(run)[-8:]) / 8 < 2.2
    assert run.summary()["val_loss"] < 2.6


@pytest.mark.parametrize(
    "model",
    [
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False},
        {"pattern": "full", "n_kv_head": 1, "tie_embeddings": False, "mlp": "relu2", "dropout": 0.1},
        {"pattern": "swa", "window": 1, "n_sink": 2, "vocab_size": 300},
    ],
    ids=["gpt2", "mqa", "swa"],
)
def test_every_kind_of_network_learns(trained, model):
    run = trained(model=model, optim={"warmup_steps": 2}, train={"max_steps": 16})
    assert losses(run)[-1] < losses(run)[0] - 0.5


def test_bfloat16_learns_as_float32_does(trained):
    one, other = (losses(trained(dtype, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here")
def test_compiled_training_equals_eager_training(trained):
    one, other = (losses(trained(name, compile=name)) for name in ("off", "on"))
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_gradient_accumulation_gives_the_losses_of_one_batch(trained, micro_batch):
    one = trained("one", train={"micro_batch": 6, "max_steps": 6})
    other = trained("other", train={"micro_batch": micro_batch, "max_steps": 6})
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    assert [x["grad_norm"] for x in other.metrics()] == pytest.approx([x["grad_norm"] for x in one.metrics()], rel=1e-3)


def test_rows_are_the_same_whatever_the_micro_batch(trained, monkeypatch):
    seen: dict[str, dict] = {}
    rows = TrainLoader.rows

    def noted(self, step, which):
        idx, targets = rows(self, step, which)
        seen[name].update({(step, row): (idx[i].tolist(), targets[i].tolist()) for i, row in enumerate(which)})
        return idx, targets

    monkeypatch.setattr(TrainLoader, "rows", noted)
    for name, micro_batch in (("all", 6), ("two", 2)):
        seen[name] = {}
        trained(name, train={"micro_batch": micro_batch, "max_steps": 5})
    assert seen["all"] == seen["two"]
    assert sorted(seen["all"]) == [(step, row) for step in range(5) for row in range(6)]


@pytest.mark.parametrize("often", [{"eval_every": 1}, {"checkpoint_every": 1}, {"eval_tokens": 20}], ids=str)
def test_neither_evaluation_nor_checkpoints_draw_from_the_training_rng(trained, often):
    rare = {"eval_every": 1000, "checkpoint_every": 1000}
    one = trained("rare", model={"dropout": 0.2}, train=rare)
    other = trained("often", model={"dropout": 0.2}, train=rare | often)
    assert losses(one) == losses(other)
    weights = [content(run.checkpoints / "step_00000012")["model.safetensors"] for run in (one, other)]
    assert weights[0] == weights[1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained):
    one, same, other = (losses(trained(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same != other
