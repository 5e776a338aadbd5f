"""What a run writes down: metrics, its summary, the files of its directory, what it says, and wandb beside them."""

import json
import math
from itertools import pairwise

import pytest
from training_runs import evaluations_find, losses

from data.prepare import prepare
from model import cost
from model.memory import measure_peak
from training import trainer
from training.optim import Optimizers, lr_factor

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
    names = [".lock", "checkpoints", "config.json", "metrics.jsonl", "summary.json", "tokenizer.json"]
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
    evaluations_find(monkeypatch, 3.0, 1.0, 2.0, 1.5)
    run = trained(train={"eval_every": 3})
    assert [run.checkpoint(which).step for which in ("best", "latest")] == [6, 12]
    assert (run.summary()["best_val_loss"], run.summary()["val_loss"]) == (1.0, 1.5)


def test_the_start_says_layers_data_device_and_what_was_probably_not_meant(trained, capsys):
    trained(model={"pattern": "full", "n_layer": 3})
    said = capsys.readouterr().out
    for part in ("full*3", "training tokens", "device cpu", "as asked", "note: window (5) is used by no layer"):
        assert part in said


def test_wandb_gets_every_line_offline(trained, wandb):
    run = trained(log={"wandb": True})
    assert wandb.started["mode"] == "offline"
    assert wandb.logged == [(line, line["step"]) for line in run.metrics()]
    assert wandb.finished
