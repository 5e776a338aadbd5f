"""Contexts longer than those of training."""

import json
import math

import pytest
from conftest import PNG, save_run
from evaluated import figures, loaded, nats

from model.gpt import GPT


@pytest.mark.slow
def test_contexts_are_doubled_and_rope_over_all_tokens_is_stretched_with_them(run_copy, capsys):
    found = figures(run_copy, extrapolate=70, plot=True)
    as_trained = [figures(run_copy, context=n)[f"perplexity[context={n}]"] for n in (32, 64)]
    assert [found[f"perplexity[context={n}]"] for n in (32, 64)] == as_trained
    assert found["perplexity"] == figures(run_copy)["perplexity"]
    model, ids = loaded(run_copy)  # a layer with a window of 5, then a full one
    for scaling in ("linear", "yarn"):
        table = {"swa": "none", "full": scaling}
        changes = {"rope_scaling": table, "rope_factor": {"swa": 1.0, "full": 4.0}, "rope_trained": 16}
        stretched = GPT(type(model.config)(**model.config.model_dump() | changes))
        stretched.load_state_dict(model.state_dict())
        losses = [nats(stretched, ids, t - t % 64, t) for t in range(200)]
        name = f"perplexity[context=64,rope={scaling}]"
        assert found[name] == pytest.approx(math.exp(sum(losses) / 200), rel=1e-5)
    assert len(found) == 3 + 2 * 2
    curve = json.loads((run_copy / "perplexity_by_context.json").read_text())
    assert (curve["context"], curve["block_size"]) == ([16, 32, 64], 16)
    assert curve["perplexity"]["as trained"] == [found["perplexity"], *as_trained]
    assert curve["perplexity"]["yarn"][0] is None
    assert (run_copy / "perplexity_by_context.png").read_bytes().startswith(PNG)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("design", "n", "said"),
    [
        ({"position": "learned"}, 1, "the learned positions of this model limit the context to 16 tokens"),
        ({"position": "alibi"}, 3, "no layer has unscaled RoPE without a window, so there is nothing to scale"),
        ({"pattern": "swa", "window": 4}, 3, "no layer has unscaled RoPE without a window"),
        (
            {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained": 4},
            3,
            "no layer has unscaled RoPE without a window",
        ),
    ],
    ids=str,
)
def test_what_cannot_go_on_or_be_stretched_is_said(tmp_path, text, capsys, design, n, said):
    save_run(tmp_path / "run", **design)
    options = {"text": str(text), "tokens": 150, "device": "cpu", "dtype": "float32"}
    assert len(figures(tmp_path / "run", extrapolate=64, **options)) == n
    assert said in capsys.readouterr().out
