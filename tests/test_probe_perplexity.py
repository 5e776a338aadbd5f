"""Evaluating a run's perplexity: the numbers of training again, any text, context and stride; loss by position."""

import json
import math

import numpy as np
import pytest
import torch
from evaluated import LINE, figures, loaded, nats

from artifacts.run_dir import RunDir
from data.loader import TokenArray, eval_batches, stream_hash
from model.constants import IGNORED
from scripts import evaluate as script
from scripts.probes import subject
from scripts.probes.results import FILE
from training.evaluate import LossByPosition

# Perplexity.


@pytest.mark.parametrize("which", ["best", "latest"])
def test_without_options_it_is_what_training_reported_to_the_last_digit(trained_run, which):
    found = figures(trained_run, checkpoint=which)
    step = RunDir(trained_run).checkpoint(which).step
    reported = next(line for line in RunDir(trained_run).metrics() if line["step"] == step)
    assert found == {key: reported[f"val_{key}"] for key in ("loss", "perplexity", "bits_per_byte")}
    if which == "latest":
        assert found["loss"] == RunDir(trained_run).summary()["val_loss"]


def test_batches_are_those_of_training_and_of_as_many_tokens_in_another_context(trained_run):
    opened = script.open_subject(trained_run, "best", device=None, dtype=None)
    assert opened.batch_rows(16) == opened.config.micro_rows == 6
    assert (opened.batch_rows(32), opened.batch_rows(10), opened.batch_rows(1000)) == (3, 9, 1)


def test_the_stream_is_the_one_that_training_hashed(trained_run, capsys):
    figures(trained_run)
    assert f"validation: 200 tokens, context 16, stride 16, stream {RunDir(trained_run).summary()['stream_hash']}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("context", "stride"), [(16, 5), (11, 3), (24, 1), (16, 16)])
def test_each_token_counts_once_after_its_own_context(run_copy, context, stride):
    model, ids = loaded(run_copy)
    expected = []
    for t in range(200):
        window = 0 if t < context else -(-(t - context + 1) // stride)  # the first that reaches it
        expected.append(nats(model, ids, window * stride, t))
    conditions = f"{f'context={context},' if context != 16 else ''}{f'stride={stride}' if stride != context else ''}"
    name = f"loss[{conditions}]" if conditions else "loss"
    assert figures(run_copy, context=context, stride=stride)[name] == pytest.approx(sum(expected) / 200, rel=1e-5)


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 43, 100])
@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("max_tokens", [None, 14, 50])
def test_windows_that_overlap_count_every_target_once_and_in_order(n_tokens, stride, max_tokens):
    tokens = TokenArray(ids=np.arange(n_tokens), name="val")
    seen, starts = [], []
    batches = eval_batches(tokens, block_size=7, batch_size=3, max_tokens=max_tokens, stride=stride)
    for idx, targets in batches:
        assert idx.shape[1] == 7 >= idx.shape[0] * 7 / 3
        counted = targets != IGNORED
        assert torch.equal(targets[counted], idx[counted] + 1)
        seen += targets[counted].tolist()
        starts += idx[:, 0].tolist()
    assert seen == list(range(1, min(n_tokens, 1 + (max_tokens or n_tokens))))
    assert starts == list(range(0, len(starts) * stride, stride))


def test_another_stride_is_another_stream():
    tokens = TokenArray(ids=np.arange(50), name="val")
    assert stream_hash(tokens, 7, stride=7) == stream_hash(tokens, 7)
    assert len({stream_hash(tokens, 7, stride=n) for n in (1, 2, 7)}) == 3


def test_bits_per_byte_of_another_text_equal_a_count_by_hand(random_run, tmp_path):
    (tmp_path / "katze.txt").write_text(LINE * 2, encoding="utf-8")
    found = figures(random_run, text=str(tmp_path / "katze.txt"), context=200, dtype="float32", device="cpu")
    model, _ = RunDir(random_run).load(random_run)
    ids = torch.tensor([*(LINE * 2).encode(), 256])  # the byte tokenizer; end-of-text ends the document
    bits = sum(nats(model.eval(), ids, 0, t) for t in range(108)) / math.log(2)
    (bits_per_byte,) = (value for name, value in found.items() if name.startswith("bits_per_byte"))
    assert bits_per_byte == pytest.approx(bits / 107, rel=1e-5)  # the first byte is no target, end-of-text no byte


def test_tokens_and_texts_stand_in_the_names_of_columns(run_copy, tmp_path):
    (tmp_path / "katze.txt").write_text(LINE * 9, encoding="utf-8")
    few = figures(run_copy, tokens=50)
    everything = figures(run_copy, tokens="all")
    other = figures(run_copy, text=str(tmp_path / "katze.txt"))
    assert list(few)[1] == "perplexity[tokens=50]"
    n_tokens = subject._validation(RunDir(run_copy), RunDir(run_copy).config()).n_tokens - 1
    assert list(everything)[1] == f"perplexity[tokens={n_tokens}]"
    assert list(other)[1].startswith("perplexity[text=katze-")
    assert set(json.loads((run_copy / FILE).read_text())) == {"evaluated_step", *few, *everything, *other}


# Loss by position.


def test_loss_by_position_is_the_mean_of_the_losses_there(run_copy):
    model, ids = loaded(run_copy)
    losses = np.array([nats(model, ids, t - t % 16, t) for t in range(192)]).reshape(12, 16)
    rest = [nats(model, ids, 192, t) for t in range(192, 200)]  # the last context is half full
    found = figures(run_copy, by_position=True)
    curve = json.loads((run_copy / "loss_by_position.json").read_text())
    assert curve["position"][:5] == [1, 2, 3, 4, 5]
    assert curve["loss"][0] == pytest.approx((losses[:, 0].sum() + rest[0]) / 13, rel=1e-5)
    assert curve["position"][-1] == pytest.approx(14.5)  # of the bin from 13 to 16
    assert curve["loss"][-1] == pytest.approx(losses[:, 12:].mean(), rel=1e-5)
    assert found["loss_last_quarter"] == pytest.approx(losses[:, 12:].mean(), rel=1e-5)
    assert found["loss"] == json.loads((run_copy / FILE).read_text())["loss"]


def test_bins_hold_every_target_once():
    by_position = LossByPosition(100)
    losses, targets = torch.rand(3, 100, dtype=torch.float64), torch.zeros(3, 100).long()
    targets[2, 40:] = -100
    losses[2, 40:] = 0
    by_position.add(losses, targets)
    positions, means = by_position.curve()
    edges = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54, 64, 76, 91, 101]
    assert len(positions) == len(means) == len(edges) - 1
    for start, end, position, mean in zip(edges, edges[1:], positions, means, strict=False):
        inside = slice(start - 1, end - 1)
        n = (targets[:, inside] == 0).sum()
        assert mean == pytest.approx((losses[:, inside].sum() / n).item())
        assert start <= position < end
    assert by_position.tail(0.25) == pytest.approx(losses[:2, 75:].mean().item())


def test_positions_that_overlapping_windows_leave_out_are_absent(run_copy):
    figures(run_copy, by_position=True, stride=4, tokens=200)
    curve = json.loads((run_copy / "loss_by_position.json").read_text())
    assert curve["position"][0] == 1  # the first window counts all
    assert len(curve["position"]) == len(curve["loss"])


def test_what_no_context_is_long_enough_for_is_absent(run_copy):
    found = figures(run_copy, by_position=True, tokens=5)
    assert set(found) == {f"{name}[tokens=5]" for name in ("loss", "perplexity", "bits_per_byte")}
    assert json.loads((run_copy / "loss_by_position.json").read_text())["position"] == [1, 2, 3, 4, 5]
