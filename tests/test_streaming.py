"""Streaming through a cache is token-by-token decoding; recomputation sees the last tokens alone."""

import pytest
import torch
from conftest import assert_equal, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_config, tiny_model
from torch import Tensor

from inference.streaming import recomputed_losses, streamed_losses, through_window
from model.device import resolve
from model.gpt import GPT

RUNTIME = resolve("cpu", "float32", "off")


def token_by_token(model: GPT, ids: Tensor) -> Tensor:
    """What generate.py computes: a token at a time into the cache."""
    cache = model.new_cache(1, len(ids) - 1)
    with torch.no_grad():
        logits = torch.cat([model(token[None, None], cache=cache)[0] for token in ids[:-1]])
    return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@pytest.mark.slow
@given(
    window=st.integers(1, 12),
    n_sink=st.integers(0, 5),
    chunk=st.sampled_from([1, 3, 7, 50]),
    pattern=st.sampled_from(["full", "swa full"]),
)
def test_a_stream_in_chunks_is_decoding_token_by_token(window, n_sink, chunk, pattern):
    model = through_window(tiny_model(tiny_config(pattern=pattern, window=4)), window, n_sink)
    ids = random_tokens(41)
    assert_equal(streamed_losses(model, ids, RUNTIME, chunk=chunk), token_by_token(model, ids), 1e-10)


def test_a_model_streams_as_it_was_trained_far_beyond_its_block_size():
    model, ids = tiny_model(tiny_config(pattern="swa full", window=4, block_size=8)), random_tokens(61)
    with torch.no_grad():
        plain = model(ids[None, :-1], ids[None, 1:], reduction="none")[0]
    assert_equal(streamed_losses(model, ids, RUNTIME, chunk=9), plain, 1e-10)


def test_a_window_changes_every_layer_and_no_weight():
    model = tiny_model(tiny_config(pattern="swa full", window=4))
    sliding = through_window(model, 7, 2)
    assert [(spec.window, spec.n_sink) for spec in sliding.config.layers] == [(7, 2), (7, 2)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sliding.parameters(), strict=True))
    assert (sliding.lm_head.weight.dtype, sliding.training) == (model.lm_head.weight.dtype, model.training)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_recomputation_sees_the_last_tokens_alone(batch_tokens):
    model, ids, W = tiny_model(tiny_config()), random_tokens(31), 7
    at = torch.tensor([0, 2, 5, 6, 7, 11, 29])
    found = recomputed_losses(model, ids, at, W, RUNTIME, batch_tokens=batch_tokens)
    for t, loss in zip(at.tolist(), found, strict=True):
        with torch.no_grad():
            logits = model(ids[None, max(0, t - W + 1) : t + 1])[0, -1]
        assert_equal(loss, -logits.log_softmax(0)[ids[t + 1]], 1e-10)


def test_one_layer_streams_as_it_is_recomputed_and_two_remember_more():
    ids, at = random_tokens(31), torch.arange(30)
    for n_layer, same in ((1, True), (2, False)):  # distances are all that RoPE tells, in float32
        model = tiny_model(tiny_config(n_layer=n_layer))
        streamed = streamed_losses(through_window(model, 5, 0), ids, RUNTIME)
        recomputed = recomputed_losses(model, ids, at, 5, RUNTIME)
        assert torch.allclose(streamed, recomputed, rtol=1e-5) == same
        assert_equal(streamed[:5], recomputed[:5], 1e-10)
