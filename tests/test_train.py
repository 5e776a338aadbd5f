"""Training: what it learns, what it writes down, when it stops, and what it refuses."""

import errno
import json
import math
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import command_line, run_config, run_program, sentences
from safetensors import SafetensorError

import train
from configs import trainer
from configs.run_dir import RunDir
from data.loader import TrainLoader
from data.prepare import prepare
from data.tokenizer import make_tokenizer
from model import checkpoint, cost, tensors
from model.errors import UserError
from model.evaluate import Evaluation
from model.gpt import GPT
from model.memory import measure_peak
from model.optim import Optimizers, lr_factor

pytestmark = pytest.mark.usefixtures("unmeasured")

ALWAYS = {
    "step": int,
    "tokens": int,
    "elapsed_s": float,
    "train_loss": float,
    "lr": float,
    "grad_norm": float,
    "skipped_steps": int,
    "kernel": str,
}
MEASURED = {
    "tokens_per_s": float,
    "mfu": float,
    "peak_memory_train_bytes": int,
    "peak_memory_eval_bytes": int,
    "peak_memory_process_bytes": int,
    "peak_memory_method": str,
}
EVALUATED = {"val_loss": float, "val_perplexity": float, "val_bits_per_byte": float}
SUMMARY = {
    "variant": str,
    "layers": str,
    "n_params": int,
    "best_val_loss": float,
    "kv_cache_bytes": dict,
    "kv_cache_dtype": str,
    "stream_hash": str,
}


def types(record: dict) -> dict[str, type]:
    return {key: type(value) for key, value in record.items()}


def losses(run: RunDir) -> list[float]:
    return [line["train_loss"] for line in run.metrics()]


def content(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def trained(tmp_path, text):
    """Train a tiny run; what is asked for differs from conftest.RUN."""

    def start(name: str = "run", **changes) -> RunDir:
        return RunDir(train.run(run_config(tmp_path / "runs", text, name, **changes)).path)

    return start


# It learns.


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


# What it writes down.


def test_a_line_of_metrics_has_the_keys_of_what_was_measured(trained, monkeypatch):
    monkeypatch.setattr(trainer, "measure_peak", measure_peak)
    first, *_, last = trained(train={"eval_every": 100}).metrics()
    assert types(first) == ALWAYS
    assert types(last) == ALWAYS | MEASURED | EVALUATED


def test_lines_come_when_logged_and_when_evaluated(trained):
    lines = trained(train={"log_every": 4, "eval_every": 5}).metrics()
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 10, 12]
    assert [line["tokens"] for line in lines] == [96 * line["step"] for line in lines]


def test_a_line_has_the_mean_loss_of_the_steps_since_the_last(trained):
    each = losses(trained("each", train={"log_every": 1}))
    spans = losses(trained("spans", train={"log_every": 4, "eval_every": 5}))
    ends = pairwise([0, 4, 5, 8, 10, 12])
    assert spans == pytest.approx([sum(each[a:b]) / (b - a) for a, b in ends], rel=1e-6)  # sums in float32


@pytest.mark.parametrize("optim", [{"optimizer": "adamw", "adamw_lr": 0.01}, {"muon_lr": 0.01}], ids=["adamw", "muon"])
def test_the_learning_rate_follows_its_schedule(trained, monkeypatch, optim):
    used: list[list[float]] = []
    step = Optimizers.step
    rates = lambda self: [group["lr"] for optimizer in self.all for group in optimizer.param_groups]
    monkeypatch.setattr(Optimizers, "step", lambda self, **skip: (used.append(rates(self)), step(self, **skip))[1])
    shape = {"schedule": "cosine", "warmup_steps": 3, "final_lr": 0.1}
    lines = trained(optim=optim | shape).metrics()
    factors = [
        lr_factor(n, max_steps=12, warmup_steps=3, schedule="cosine", decay_fraction=0.4, final_lr=0.1)
        for n in range(12)
    ]
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * x for x in factors])
    for rates_of_group in zip(*used, strict=True):
        peak = rates_of_group[3]
        assert list(rates_of_group) == pytest.approx([peak * x for x in factors])


def test_perplexity_and_bits_per_byte_follow_from_the_loss(trained, text):
    summary = trained().summary()
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    val = prepare(str(text), "byte", root=text.parent / "prepared", progress=False).meta.val
    n_targets, n_bytes = val.n_bytes, val.n_bytes - 1  # the first byte is no target, end-of-text is one and no byte
    expected = summary["val_loss"] * n_targets / n_bytes / math.log(2)
    assert summary["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_the_summary_is_the_last_line_and_what_the_run_came_to(trained):
    run = trained("a/variant")
    last, summary = run.metrics()[-1], run.summary()
    assert types(summary) == types(last) | SUMMARY
    assert {key: summary[key] for key in last} == last
    model = run.config().model
    assert (summary["variant"], summary["layers"]) == ("variant", "swa full")
    assert summary["n_params"] == cost.n_params(model)
    assert summary["best_val_loss"] == min(line["val_loss"] for line in run.metrics() if "val_loss" in line)
    assert summary["kv_cache_bytes"] == {str(n): cost.cache_bytes(model, n) for n in (16, 32_768)}
    assert summary["kv_cache_dtype"] == "bfloat16"


def test_a_run_leaves_config_metrics_summary_tokenizer_and_checkpoints(trained):
    run = trained()
    names = ["checkpoints", "config.json", "metrics.jsonl", "summary.json", "tokenizer.json"]
    assert sorted(file.name for file in run.path.iterdir()) == names
    assert {file.name for file in run.checkpoints.iterdir()} >= {"best", "latest", "step_00000012"}
    assert not list(run.path.rglob("*.tmp"))
    facts = run.facts()
    assert {"config", "versions", "runtime", "commit", "data", "matmul_flops_per_s"} <= set(facts)
    assert facts["config"]["model"]["vocab_size"] == 257


def test_every_file_is_json_that_any_program_reads(trained):
    run = trained(train={"eval_every": 10, "checkpoint_every": 4, "max_steps": 10})
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    files = [*run.path.rglob("*.json"), *run.path.rglob("*.jsonl")]
    assert "step_00000008/state.json" in [f"{file.parent.name}/{file.name}" for file in files]
    for file in files:
        for whole in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(whole, parse_constant=refuse)


def test_the_best_checkpoint_is_of_the_lowest_validation_loss(trained, monkeypatch):
    found = iter([3.0, 1.0, 2.0, 1.5])
    result = lambda *_: Evaluation(loss=next(found), perplexity=1.0, bits_per_byte=1.0, n_tokens=1)
    monkeypatch.setattr(trainer, "evaluate", result)
    run = trained(train={"eval_every": 3})
    assert [run.checkpoint(which).step for which in ("best", "latest")] == [6, 12]
    assert (run.summary()["best_val_loss"], run.summary()["val_loss"]) == (1.0, 1.5)


def test_the_start_says_layers_data_device_and_what_was_probably_not_meant(trained, capsys):
    trained(model={"pattern": "full", "n_layer": 3})
    said = capsys.readouterr().out
    for part in ("full*3", "training tokens", "device cpu", "as asked", "note: window (5) is used by no layer"):
        assert part in said


# Its batches and its evaluations.


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
    where = f"highest is the loss of rows 2 to 3 of its batch, which begin at tokens {one}, {two} of {tokens.path};"
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


# It stops by itself when it no longer gets better, and says when it learns by heart.


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluations find these losses."""

    def give(*values: float) -> None:
        found = iter(values)
        result = lambda *_: Evaluation(loss=next(found), perplexity=1.0, bits_per_byte=1.0, n_tokens=1)
        monkeypatch.setattr(trainer, "evaluate", result)

    return give


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


def test_that_both_rise_is_no_learning_by_heart(trained, evaluated, capsys):
    evaluated(3.0, 3.05, 3.2, 3.5)
    trained(train={"eval_every": 3, "log_every": 3}, optim={"muon_lr": 1e-9, "adamw_lr": 1e-9})
    assert "note: step" not in capsys.readouterr().err


# wandb mirrors the metrics.


def test_wandb_gets_every_line_offline(trained, wandb):
    run = trained(log={"wandb": True})
    assert wandb.started["mode"] == "offline"
    assert wandb.logged == [(line, line["step"]) for line in run.metrics()]
    assert wandb.finished


# A second start.


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, text, program):
    arguments = command_line(tmp_path, text)
    first = program(train.main, *arguments)
    before = content(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    second = program(train.main, *arguments)
    assert second.code == 0
    assert second.out.splitlines() == [
        f"{tmp_path}/run is finished at step 12: --train.max_steps extends it, --name begins anew",
        first.out.splitlines()[-1],
    ]
    assert before == (content(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")})


def test_a_finished_run_asked_for_fewer_steps_changes_nothing(trained):
    run = trained()
    before = content(run.path)
    assert trained(train={"max_steps": 5}).summary()["step"] == 12
    assert content(run.path) == before


def test_a_finished_run_can_be_extended_as_if_it_had_never_ended(trained):
    constant = {"schedule": "constant", "warmup_steps": 3}
    trained("parts", optim=constant, train={"max_steps": 8})
    parts = trained("parts", optim=constant, train={"max_steps": 12})
    whole = trained("whole", optim=constant, train={"max_steps": 12})
    assert losses(parts) == losses(whole)
    assert parts.summary()["step"] == 12
    last = "step_00000012/model.safetensors"
    assert content(parts.checkpoints)[last] == content(whole.checkpoints)[last]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"window": 3}}, "model.window = 5, now it is 3"),
        ({"seed": 2}, "seed = 1337, now it is 2"),
        ({"train": {"global_batch_tokens": 32}}, "train.global_batch_tokens = 96, now it is 32"),
        ({"data": {"tokenizer": "char"}}, "data.tokenizer = 'byte', now it is 'char'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_config_in_the_same_directory_is_refused_by_its_key(tmp_path, text, program, trained, changes, key):
    run = trained()
    before = content(run.path)
    program(train.main, *command_line(tmp_path / "runs", text, **changes)).assert_refused(
        f"{run.path} was begun with {key}", "give another --name, or remove the directory to begin again"
    )
    assert content(run.path) == before


def test_other_data_under_the_same_name_are_refused(tmp_path, program):
    text = tmp_path / "a.txt"
    text.write_text(sentences(60), encoding="utf-8")
    arguments = command_line(tmp_path / "runs", text)
    assert program(train.main, *arguments).code == 0
    text.write_text(sentences(61), encoding="utf-8")
    before = content(tmp_path / "runs")
    program(train.main, *arguments).assert_refused("run was begun on other data (hash ", "give another --name")
    assert content(tmp_path / "runs") == before


def test_the_advice_to_remove_the_directory_works(trained):
    run = trained()
    shutil.rmtree(run.path)
    assert trained(seed=2).summary()["step"] == 12


# What bad input gets.

SHORT_TEXT = {"model": {"block_size": 8192}, "train": {"global_batch_tokens": 8192}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": {"n_embd": 22}}, ["n_embd (22) must be divisible by n_head (4)"]),
        ({"model": {"n_kv_head": 3}}, ["n_head (4) must be divisible by n_kv_head (3)"]),
        ({"model": {"n_embd": 20}}, ["RoPE rotates pairs: head_dim (5) must be even"]),
        ({"model": {"window": 0}}, ["model.window (0)"]),
        ({"model": {"window": -1}}, ["model.window (-1)"]),
        ({"model": {"pattern": "swa ful"}}, ["'ful' is no layer", "did you mean full?"]),
        ({"model": {"pattern": "5:"}}, ["pattern ('5:')", "a ratio is"]),
        ({"model": {"pattern": "0:0"}}, ["pattern ('0:0')", "a + b >= 1"]),
        ({"model": {"vocab_size": 100}}, ["model.vocab_size (100) is below the 257 of byte: leave it out"]),
        ({"data": {"tokenizer": "gpt3"}}, ["tokenizer 'gpt3'", "did you mean gpt2?"]),
        ({"data": {"text": "shakespear"}}, ["text 'shakespear'", "did you mean shakespeare?"]),
        ({"data": {"text": "no/such/file.txt"}}, ["no/such/file.txt: there is no such file or folder"]),
        (SHORT_TEXT, ["tokens, block_size is 8192; use --model.block_size 2048 or more text"]),
        ({"device": "gpu"}, ["device (gpu) is unknown; here there is"]),
    ],
    ids=lambda x: x[0][:30] if isinstance(x, list) else "",
)
def test_a_config_that_cannot_work_is_refused_and_nothing_is_written(tmp_path, text, program, changes, parts):
    arguments = command_line(tmp_path / "runs", text, **changes)
    program(train.main, *arguments, name="train.py").assert_refused("train.py: ", *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is cuda")
def test_cuda_where_there_is_none_ends_a_real_process_with_2(tmp_path, text):
    ended = run_program("train.py", *command_line(tmp_path / "runs", text, device="cuda"))
    ended.assert_refused("train.py: device (cuda) is not there; here there is ", "take one of them, or auto")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        (b"", ["the text is empty", "give a longer one"]),
        (b"tiny", ["the text has 4 bytes, too few to keep a tenth for validation", "give a longer one"]),
        (b"fine so far \xff" * 9, ["a.txt: the byte at offset 12 is not UTF-8; convert the file", "iconv"]),
        ("fine".encode("utf-16") * 9, ["a.txt: the byte at offset 0 is not UTF-8", "UTF-16"]),
    ],
    ids=["empty", "short", "latin1", "utf-16"],
)
def test_a_text_that_cannot_be_read_is_refused_and_nothing_is_written(tmp_path, program, written, parts):
    (tmp_path / "a.txt").write_bytes(written)
    program(train.main, *command_line(tmp_path / "runs", tmp_path / "a.txt")).assert_refused(*parts)
    left = [file.name for file in tmp_path.rglob("*") if file.suffix != ".lock"]
    assert sorted(left) == ["a.txt", "prepared"]


@pytest.fixture
def prepared(tmp_path) -> tuple[Path, Path]:
    """A text of its own, and the folder of its tokens."""
    text = tmp_path / "a.txt"
    text.write_text(sentences(60), encoding="utf-8")
    return text, prepare(str(text), "byte", root=tmp_path / "prepared", progress=False).directory


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: os.truncate(folder / "train.bin", 99), ["train.bin: has 99 bytes where"]),
        (lambda folder: (folder / "val.bin").unlink(), ["val.bin: has 0 bytes where"]),
        (lambda folder: os.truncate(folder / "meta.json", 30), ["meta.json: damaged"]),
        (
            lambda folder: make_tokenizer("char", lambda: iter(["other"])).save(folder / "tokenizer.json"),
            ["tokenizer.json: this is char", "but the tokens were made with byte"],
        ),
    ],
    ids=["truncated", "missing", "meta", "tokenizer"],
)
def test_damaged_tokens_are_refused_and_no_run_is_begun(tmp_path, program, prepared, spoil, parts):
    text, folder = prepared
    spoil(folder)
    program(train.main, *command_line(tmp_path / "runs", text)).assert_refused(*parts, "prepare the text again")
    assert not (tmp_path / "runs").exists()


def test_the_advice_for_damaged_tokens_works(tmp_path, program, prepared):
    text, folder = prepared
    os.truncate(folder / "train.bin", 99)
    shutil.rmtree(folder)
    assert program(train.main, *command_line(tmp_path / "runs", text)).code == 0


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path, text, program):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    program(train.main, *command_line(tmp_path, text)).assert_refused("run exists and is no run: give another --name")
    assert content(tmp_path) == {"run/thesis.tex": b"mine"}


def test_runs_below_a_file_are_refused(tmp_path, text, program):
    (tmp_path / "runs").write_text("a file")
    program(train.main, *command_line(tmp_path / "runs", text)).assert_refused(str(tmp_path / "runs"))


# A full disk.

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


def test_an_error_of_the_user_is_a_valueerror_that_programs_can_catch(tmp_path, text):
    with pytest.raises(UserError) as error:
        train.run(run_config(tmp_path, text, device="gpu"))
    assert isinstance(error.value, ValueError)


def test_an_interrupted_preparation_is_one_line(tmp_path, text, program, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupted)
    ended = program(train.main, *command_line(tmp_path, text), name="train.py")
    assert (ended.code, ended.err) == (130, "train.py: interrupted\n")
