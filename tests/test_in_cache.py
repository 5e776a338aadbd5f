"""Positions in the cache against a reference that builds each query's cache anew, and against positions in the text."""

import math

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, logits_ragged, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_config, tiny_model
from torch import Tensor

from model.config import ModelConfig
from model.context import ForwardContext
from model.gpt import GPT
from model.mixers.attention import Attention

B, T, W = 3, 23, 4
LOOSE = 1e-6  # cos and sin are float32, and different positions give the same distance


def in_cache(window: int = W, n_sink: int = 3, **overrides) -> ModelConfig:
    return tiny_config(pattern="full swa", window=7, **overrides).sliding(window, n_sink, rope_in_cache=True)


def attended_by_hand(mixer: Attention, x: Tensor) -> Tensor:
    """(1, T, C) -> (1, T, C) query by query: the tokens that its cache holds, numbered from 0 as they lie there."""
    spec, out = mixer.spec, []
    half = spec.head_dim // 2

    def heads(projection, norm, tokens: Tensor) -> Tensor:
        return norm(projection(tokens).view(len(tokens), -1, spec.head_dim))  # (n, heads, D)

    def turn(vector: Tensor, place: int) -> Tensor:
        angle = [place * spec.rope.base ** (-2 * m / spec.head_dim) for m in range(half)]
        cos, sin = (torch.tensor([f(a) for a in angle], dtype=x.dtype) for f in (math.cos, math.sin))
        a, b = vector[..., :half], vector[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    for i in range(x.shape[1]):
        held = [j for j in range(i + 1) if j < spec.n_sink or i - j < spec.window]
        tokens = x[0, held]
        q = turn(heads(mixer.c_q, mixer.q_norm, x[0, i : i + 1])[0], len(held) - 1)  # (H, D)
        k = heads(mixer.c_k, mixer.k_norm, tokens)
        k = torch.stack([turn(k[place], place) for place in range(len(held))])  # (n, K, D)
        v = mixer.c_v(tokens).view(len(held), -1, spec.head_dim)
        k, v = (y.repeat_interleave(spec.n_head // spec.n_kv_head, dim=1) for y in (k, v))
        odds = torch.einsum("hd,nhd->hn", q, k).div(spec.head_dim**0.5).softmax(dim=1)
        out.append(torch.einsum("hn,nhd->hd", odds, v).flatten())
    return mixer.c_proj(torch.stack(out))[None]


@pytest.mark.parametrize("n_sink", [0, 1, 3])
@pytest.mark.parametrize("window", [1, W])
@pytest.mark.parametrize("sizes", [None, [1] * T, [5, 1, 9, 1, 7]], ids=["parallel", "ones", "chunks"])
@torch.no_grad()
def test_a_layer_is_what_a_cache_built_anew_for_every_query_gives(window, n_sink, sizes):
    model = tiny_model(in_cache(window, n_sink))
    mixer, x = model.h[0].mixer, torch.randn(1, T, 20, dtype=torch.float64)
    if sizes is None:
        found = mixer(x, ForwardContext(pos=torch.arange(T)[None], added=T))
    else:
        cache, found = mixer.new_cache(1, T, x.device, x.dtype), []
        for start, n in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
            past = torch.tensor([start])
            step = ForwardContext(
                pos=past[:, None] + torch.arange(n), contiguous=start == 0, past=past, added=n, past_bound=start
            )
            found.append(mixer(x[:, start : start + n], step, cache))
        found = torch.cat(found, dim=1)
    assert_equal(found, attended_by_hand(mixer, x), LOOSE)


@torch.no_grad()
def test_positions_in_the_cache_are_another_function_once_something_is_forgotten():
    model, idx = tiny_model(in_cache()), random_tokens(B, T)
    absolute = GPT(tiny_config(pattern="full swa", window=7).sliding(W, 3)).double().eval()
    absolute.load_state_dict(model.state_dict())
    same, other = model(idx), absolute(idx)
    assert_equal(same[:, : W + 3], other[:, : W + 3], LOOSE)
    assert (same - other)[:, W + 3 :].abs().amin(dim=(0, 1)).max() > 1e-3


@torch.no_grad()
def test_without_sinks_both_positions_are_the_same():
    model, idx = tiny_model(in_cache(n_sink=0)), random_tokens(B, T)
    absolute = GPT(tiny_config(pattern="full swa", window=7).sliding(W, 0)).double().eval()
    absolute.load_state_dict(model.state_dict())
    assert_equal(model(idx), absolute(idx), LOOSE)


@torch.no_grad()
def test_a_text_that_nothing_is_forgotten_of_is_full_attention():
    model, idx = tiny_model(in_cache(T - 3, 3)), random_tokens(B, T)
    full = GPT(tiny_config()).double().eval()
    full.load_state_dict(model.state_dict())
    assert_equal(model(idx), full(idx), LOOSE)


SIZES = {"one shot": [T], "ones": [1] * T, "W": [W] * T, "prompt then ones": [9] + [1] * T, "wide": [2, 15, 1, 5]}


@pytest.mark.parametrize("n_sink", [0, 1, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rolling", [True, False])
@torch.no_grad()
def test_cached_matches_uncached(sizes, n_sink, rolling):
    model, idx = tiny_model(in_cache(n_sink=n_sink)), random_tokens(B, T)
    cache = model.new_cache(B, T, rolling=rolling)
    assert_equal(logits_in_chunks(model, idx, sizes, cache), model(idx), LOOSE)


@given(sizes=st.lists(st.integers(1, 9), max_size=20), window=st.integers(1, 9), n_sink=st.integers(0, 4))
def test_cached_matches_uncached_for_random_chunks_and_windows(sizes, window, n_sink):
    model, idx = tiny_model(in_cache(window, n_sink)), random_tokens(B, T)
    with torch.no_grad():
        assert_equal(logits_in_chunks(model, idx, sizes), model(idx), LOOSE)


@torch.no_grad()
def test_ragged_rows_equal_single_rows_then_decode_together():
    model, chunks = tiny_model(in_cache()), ([5, 0, 3], [0, 9, 6], [6, 1, 0], [1, 1, 1])
    totals = [sum(row) for row in zip(*chunks, strict=True)]
    rows = [random_tokens(n + 4, seed=20 + n) for n in totals]
    cache = model.new_cache(B, max(totals) + 4)
    parts = logits_ragged(model, rows, chunks, cache)
    decoded = logits_in_chunks(model, torch.stack([row[-4:] for row in rows]), [1, 1, 2], cache)
    for row, part, tail in zip(rows, parts, decoded, strict=True):
        assert_equal(torch.cat((*part, tail)), model(row[None])[0], LOOSE)


@torch.no_grad()
def test_gradients_flow_as_in_the_parallel_form_without_nan():
    model, idx = tiny_model(in_cache()), random_tokens(B, T)
    with torch.enable_grad():
        model(idx, random_tokens(B, T, seed=9)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_no_angle_grows_with_the_text():
    """After a million tokens a step is to the bit what it was: places are the same."""
    model, idx = tiny_model(in_cache(n_sink=0), dtype=torch.float32), random_tokens(1, 3 * T)
    early, late = model.new_cache(1, 99), model.new_cache(1, 99)
    late.pos.fill_(10**6 * W)
    late.length = 10**6 * W
    one, other = (logits_in_chunks(model, idx, [1] * 3 * T, cache) for cache in (early, late))
    assert torch.equal(one[:, 2 * W :], other[:, 2 * W :])
