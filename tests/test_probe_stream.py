"""A run decoded through a window as one stream, against recomputation; attention to its first tokens."""

import json
import math

import pytest
import torch
from evaluated import figures, loaded, nats

from inference import streaming
from scripts import evaluate as script
from scripts.probes.stream import sample


def test_a_stream_is_decoded_through_the_window_and_recomputed(run_copy, capsys):
    found = figures(run_copy, stream=True, window=6, n_sink=(0, 2), length=150, samples=31)
    model, ids = loaded(run_copy)
    runtime = script.open_subject(run_copy, "best", device=None, dtype=None).runtime
    at = sample(150, 31)
    recomputed = torch.tensor([nats(model, ids, max(0, t - 5), t) for t in at.tolist()])
    losses = {
        k: streaming.streamed_losses(streaming.through_window(model, 6, k), ids[:151], runtime, chunk=1) for k in (0, 2)
    }
    above = min((losses[k][at] - recomputed for k in (0, 2)), key=lambda difference: difference.std())
    floor = found["recomputed_perplexity[context=6,length=150]"]
    assert math.log(floor) in [pytest.approx((losses[k].mean() - above.mean()).item(), rel=1e-5) for k in (0, 2)]
    for k in (0, 2):
        setting = f"[window=6,n_sink={k},length=150]"
        perplexity = found[f"stream_perplexity{setting}"]
        assert perplexity == pytest.approx(losses[k].mean().exp().item(), rel=1e-5)
        assert found[f"stream_minus_recomputed{setting}"] == pytest.approx(math.log(perplexity / floor), abs=1e-9)
    streams = json.loads((run_copy / "loss_in_stream.json").read_text())["streams"]
    assert list(streams) == ["window 6, 0 sinks", "window 6, 2 sinks", "recomputed from 6"]
    assert "a stream of 150 tokens, 31 of them recomputed" in capsys.readouterr().out


def test_where_every_target_is_recomputed_nothing_is_estimated(run_copy):
    found = figures(run_copy, stream=True, window=6, length=100, samples=100)
    model, ids = loaded(run_copy)
    exact = sum(nats(model, ids, max(0, t - 5), t) for t in range(100)) / 100
    assert found["recomputed_perplexity[context=6,length=100]"] == pytest.approx(math.exp(exact), rel=1e-5)
    content = json.loads((run_copy / "loss_in_stream.json").read_text())
    assert content["position"][0] == 100 / 64
    assert content["streams"]["recomputed from 6"][0] == pytest.approx(
        sum(nats(model, ids, 0, t) for t in range(4)) / 4, rel=1e-5
    )


@pytest.mark.parametrize(("N", "n"), [(10, 3), (1000, 7), (8192, 512), (5, 5), (5, 9)])
def test_a_sample_has_one_target_of_each_part_of_the_stream(N, n):
    at = sample(N, n)
    assert torch.equal(at, sample(N, n))
    assert (at * min(n, N) // N).tolist() == list(range(min(n, N)))


def test_a_window_wider_than_that_of_training_is_said(run_copy, capsys):
    figures(run_copy, stream=True, window=6, length=40)
    assert "note: layers trained with a window of 5 now attend to 6 tokens" in capsys.readouterr().out
    figures(run_copy, stream=True, window=5, length=40)
    assert "note" not in capsys.readouterr().out


def test_without_a_window_it_streams_as_trained(run_copy):
    found = figures(run_copy, stream=True, length=120)
    model, ids = loaded(run_copy)
    with torch.no_grad():
        losses = model(ids[None, :120], ids[None, 1:121], reduction="none")
    assert found["stream_perplexity[length=120]"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert set(found) == {f"{name}[length=120]" for name in ("stream_perplexity", "stream_minus_recomputed")} | {
        "recomputed_perplexity[context=16,length=120]"
    }


def test_the_attention_that_first_tokens_get_is_a_column_for_each_layer(run_copy, capsys):
    found = figures(run_copy, attention_to_first=2)
    by_layer = [found[f"attention_to_first[layer={i},k=2]"] for i in (0, 1)]
    assert found["attention_to_first[k=2]"] == pytest.approx(sum(by_layer) / 2)
    assert 0 < by_layer[0] < by_layer[1] < 1  # the window of layer 0 loses them
    equal = sum(2 / n for n in range(3, 17)) / 14
    assert f"with uniform attention  {equal:.4f}" in capsys.readouterr().out
