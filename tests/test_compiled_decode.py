"""Compiled steps of decoding against plain ones: the same logits and the same text, for whatever a layer may be."""

import os
import shutil

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, logits_ragged, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import by_kind, designs, make_sampler, tiny_config, tiny_model
from torch import Tensor

from inference import compiled_decode as decode
from inference.sampling import Sampler, stream
from model.cpu import processor
from model.gpt import GPT
from model.mixers import MIXERS

T = 13
SPARSE = {"sparse_block": 3, "n_summary": 1, "star_context": 8, "head_windows": (2, 5)}
KINDS = {kind: {"pattern": kind, "window": 4, "n_sink": 1, **SPARSE} for kind in MIXERS}
SHAPED = {
    "alibi": {"position": by_kind("none", swa="alibi", full="alibi"), "pattern": "swa full", "window": 4},
    "shaped": {"attn_softcap": 1.5, "sink_logit": True, "attn_gate": "head", "logit_softcap": 2.0},
    "in-cache": {"pattern": "swa", "window": 3, "n_sink": 2, "rope_in_cache": True},
    "biases": {"bias": True, "norm": "layernorm", "mlp": "gelu", "position": "learned", "block_size": 40},
}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


def fused(model: GPT) -> GPT:
    decode.use_compiled_decode(model)
    return model


def text(model: GPT, n: int, *, prompts: Tensor, sampler: Sampler, **options) -> list[list[int]]:
    """n tokens after each prompt."""
    cache = model.new_cache(len(prompts), prompts.shape[1] + n)
    return [
        token.tolist() for _, token in zip(range(n), stream(model, cache, prompts, sampler, **options), strict=False)
    ]


@settings(max_examples=25)
@given(design=designs, n_prompt=st.integers(1, 9), batch_size=st.sampled_from([1, 3, 7]))
def test_one_token_at_a_time_equals_the_plain_pass(design, n_prompt, batch_size):
    model, idx = tiny_model(tiny_config(**design)), random_tokens(batch_size, 2 * T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "compiled", lambda function: function)
        got = logits_in_chunks(fused(model), idx, [n_prompt] + [1] * 2 * T)
    with torch.no_grad():
        assert_equal(got, model(idx), 1e-10)


@settings(max_examples=25)
@given(design=designs, prompts=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_rows_at_different_places_equal_single_rows(design, prompts):
    model, rows = fused(tiny_model(tiny_config(**design))), random_tokens(3, 2 * T)
    cache = model.new_cache(3, 2 * T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "compiled", lambda function: function)
        logits_ragged(model, list(rows), [prompts], cache)
        n = 2 * T - max(prompts)
        tails = torch.stack([row[p : p + n] for row, p in zip(rows, prompts, strict=True)])
        decoded = logits_in_chunks(model, tails, [1] * n, cache)
    for row, p, tail in zip(rows, prompts, decoded, strict=True):
        assert_equal(tail, model(row[None, : p + n])[0, p:].detach(), 1e-10)


@torch.no_grad()
def test_a_context_that_came_with_the_prompt_holds_for_every_step(uncompiled):
    model, idx = fused(tiny_model(tiny_config(**KINDS["star"]))), random_tokens(3, 2 * T)
    cache = model.new_cache(3, 2 * T)
    got = [model(idx[:, :5], cache=cache, star_context=4)] + [model(x, cache=cache) for x in idx[:, 5:].split(1, dim=1)]
    assert_equal(torch.cat(got, dim=1), model(idx, star_context=4), 1e-10)
    assert not torch.allclose(model(idx, star_context=4), model(idx))


@pytest.mark.parametrize("kind", MIXERS)
def test_every_kind_of_layer_is_traced_once_for_all_lengths(traced, kind):
    traced(KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize("ragged", [False, True])
def test_every_shape_of_scores_is_traced_once_for_all_lengths(traced, shape, ragged):
    traced(SHAPED[shape], ragged=ragged)


def test_rows_at_different_places_are_traced_once_for_all_lengths(traced):
    traced(KINDS["swa"], ragged=True)


@needs_compiler
@torch.no_grad()
def test_compiled_steps_equal_the_plain_pass():
    model = fused(tiny_model(tiny_config(pattern="swa", n_layer=1, window=5, n_sink=1), dtype=torch.float32))
    idx = random_tokens(2, 3 * T)
    assert_equal(logits_in_chunks(model, idx, [4] + [1] * 40), model(idx), 1e-4)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("design", (KINDS | SHAPED).values(), ids=(KINDS | SHAPED).keys())
@torch.no_grad()
def test_compiled_steps_of_every_kind_of_layer_equal_the_plain_pass(design):
    model, idx, sizes = tiny_model(tiny_config(**design)), random_tokens(3, 2 * T), [7] + [1] * 40
    plain = logits_in_chunks(model, idx, sizes)
    assert_equal(logits_in_chunks(fused(model), idx, sizes), plain, 1e-10)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "sampler", [make_sampler(temperature=0), make_sampler(seed=3), make_sampler(repetition_penalty=1.3)]
)
def test_the_text_is_that_of_the_plain_pass(sampler):
    model, prompts = tiny_model(tiny_config(pattern="swa full", window=5, n_sink=1)), random_tokens(2, 4)
    options = {"prompts": prompts, "sampler": sampler, "n_samples": 2}
    plain = text(model, 40, **options)
    assert text(fused(model), 40, **options) == plain


def test_a_prompt_is_read_by_the_plain_pass(monkeypatch):
    called = []
    monkeypatch.setattr(decode, "compiled", lambda function: called.append(function) or function)
    model = fused(tiny_model(tiny_config()))
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        model(random_tokens(2, 4), cache=cache)
        model(random_tokens(2, 3), cache=cache)
    assert called == []


def test_compiled_steps_are_kept_where_later_runs_find_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back, whether it was there or not
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    decode.compiled.__wrapped__(fused)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "sash" / "inductor" / processor.fingerprint())
