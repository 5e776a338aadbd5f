"""The contract of every mixer, through whole small networks: registering a mixer tests it."""

from collections.abc import Iterable
from functools import cache
from itertools import product

import pytest
import torch
from conftest import assert_contract, assert_equal, logits_in_chunks, logits_ragged, random_tokens, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import designs, tiny_config, tiny_model
from torch import Tensor

from model.config import ModelConfig
from model.cost import cache_bytes
from model.gpt import GPT
from model.mixers import MIXERS

B, T, W = 3, 13, 4
WINDOWS = (W, 1, 2, T - 1, T, T + 1)
BASES = {"swa": 100.0, "full": 1e4}
ROTATED = {"swa": "rope", "full": "none"}


def cases(patterns: Iterable[str], windows: Iterable[int], heads: Iterable[int], **overrides) -> dict:
    """A network for each of these and for 0 and 3 sinks, where they change its layers."""
    unique = {}
    for pattern, window, n_kv_head, n_sink in product(patterns, windows, heads, (0, 3)):
        sparse = {"sparse_block": 3, "n_summary": 1, "star_context": 8, "head_windows": (2, 5)[: n_kv_head // 2 or 1]}
        config = tiny_config(pattern=pattern, window=window, n_sink=n_sink, n_kv_head=n_kv_head, **sparse, **overrides)
        name = f"{pattern} W{window} sink{n_sink} kv{n_kv_head}".replace(" ", "-")
        unique.setdefault(config.layers, pytest.param(config, id=name))
    return unique


ALONE = cases(MIXERS, WINDOWS, (2,)) | cases(MIXERS, (W,), (6, 1))
TOGETHER = cases(("swa full", "full swa*2"), (W,), (2,), n_layer=3, rope_base=BASES)
TOGETHER |= cases(("2:1",), (W,), (2,), n_layer=3, position=ROTATED)
TOGETHER |= cases(("linear*2 swa full",), (W,), (2,), n_layer=4)
LOOPED = cases(("swa full",), (W,), (2,), loops=2)
TOGETHER |= LOOPED
each_mixer = pytest.mark.parametrize("config", (ALONE | TOGETHER).values())
some_mixers = pytest.mark.parametrize("config", (cases(MIXERS, (W, 1), (2,), n_layer=3) | TOGETHER).values())


def network(config: ModelConfig) -> GPT:
    """The float64 network of a config, built once."""
    return _network(config.model_dump_json())


@cache
def _network(config: str) -> GPT:
    return tiny_model(ModelConfig.model_validate_json(config))


@torch.no_grad()
def logits(config: ModelConfig, idx: Tensor) -> Tensor:
    return network(config)(idx)


CHUNKINGS = {
    "one-shot": lambda w: [T],
    "ones": lambda w: [1] * T,
    "W-1": lambda w: [max(1, w - 1)] * T,
    "W": lambda w: [w] * T,
    "W+1": lambda w: [w + 1] * T,
    "prompt-then-ones": lambda w: [9, 1, 1, 1, 1],
    "over-the-wrap": lambda w: [1, 12],
    "odd": lambda w: [2, 5, 1, 3, 2],
}


@each_mixer
@pytest.mark.parametrize("t", [1, W, 9, T - 1])
def test_later_tokens_leave_earlier_logits_alone(config, t):
    idx = random_tokens(B, T)
    later = idx.clone()
    later[:, t:] = (later[:, t:] + 1) % 31
    assert_equal(logits(config, later)[:, :t], logits(config, idx)[:, :t])


@each_mixer
@pytest.mark.parametrize("t", [1, W, 9, T - 1])
def test_prefix_gives_the_prefix_of_the_logits(config, t):
    idx = random_tokens(B, T)
    assert_equal(logits(config, idx[:, :t]), logits(config, idx)[:, :t])


@each_mixer
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_cached_matches_uncached(config, chunking):
    idx, sizes = random_tokens(B, T), CHUNKINGS[chunking](config.window or W)
    assert_equal(logits_in_chunks(network(config), idx, sizes), logits(config, idx))


@some_mixers
@given(sizes=st.lists(st.integers(1, 9), max_size=20), spare=st.integers(0, 7))
def test_cached_matches_uncached_for_random_chunkings(config, sizes, spare):
    idx = random_tokens(B, 2 * T)
    cache = network(config).new_cache(B, 2 * T + spare)
    assert_equal(logits_in_chunks(network(config), idx, sizes, cache), logits(config, idx))


@some_mixers
def test_reset_cache_is_as_good_as_new(config):
    cache, first, second = network(config).new_cache(B, T), random_tokens(B, T), random_tokens(B, T, seed=9)
    logits_in_chunks(network(config), first, [5], cache)
    cache.reset()
    assert_equal(logits_in_chunks(network(config), second, [3, 1], cache), logits(config, second))


@some_mixers
def test_reset_cache_ignores_what_a_ragged_batch_left(config):
    cache, idx = network(config).new_cache(B, 20), random_tokens(B, T)
    logits_ragged(network(config), list(random_tokens(B, T, seed=9)), [[9, 0, 4]], cache)
    cache.reset()
    assert_equal(logits_in_chunks(network(config), idx, [1, 4], cache), logits(config, idx))


@some_mixers
@pytest.mark.parametrize("prompt", [2, 7])
def test_fork_continues_every_row_n_times(config, prompt):
    idx, tails = random_tokens(B, prompt), random_tokens(B * 2, T - prompt, seed=9)
    cache = network(config).new_cache(B, T)
    logits_in_chunks(network(config), idx, [prompt], cache)
    forked = logits_in_chunks(network(config), tails, [1, 3], cache.fork(2))
    whole = torch.cat((idx.repeat_interleave(2, dim=0), tails), dim=1)
    assert_equal(forked, logits(config, whole)[:, prompt:])


@some_mixers
def test_fork_leaves_the_original_alone(config):
    idx = random_tokens(B, T)
    cache = network(config).new_cache(B, T)
    head = logits_in_chunks(network(config), idx[:, :7], [7], cache)
    logits_in_chunks(network(config), random_tokens(B * 2, 6), [1, 5], cache.fork(2))
    tail = logits_in_chunks(network(config), idx[:, 7:], [1, 5], cache)
    assert_equal(torch.cat((head, tail), dim=1), logits(config, idx))


@some_mixers
@given(prompts=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any))
def test_ragged_cache_forks_with_its_positions(config, prompts):
    rows = random_tokens(len(prompts), 2 * T)
    cache = network(config).new_cache(len(rows), 2 * T)
    logits_ragged(network(config), list(rows), [prompts], cache)
    n = 2 * T - max(prompts)
    tails = torch.stack([row[p : p + n] for row, p in zip(rows, prompts, strict=True)]).repeat_interleave(2, dim=0)
    got = logits_in_chunks(network(config), tails, [1, 8], cache.fork(2))
    full = logits(config, rows)
    expected = torch.stack([full[b, p : p + n] for b, p in enumerate(prompts)]).repeat_interleave(2, dim=0)
    assert_equal(got, expected)


@each_mixer
@pytest.mark.parametrize("sizes", [[T], [1] * T, [9, 4]], ids=["one shot", "one by one", "chunks"])
def test_batch_rows_are_independent(config, sizes):
    idx = random_tokens(B, T)
    other = torch.cat((random_tokens(1, T, seed=9), idx[1:]))
    got = logits_in_chunks(network(config), other, sizes)
    assert_equal(got[1:], logits_in_chunks(network(config), idx, sizes)[1:])


RAGGED = ([5, 0, 3], [0, 4, 6], [6, 1, 0], [1, 1, 1])


@each_mixer
def test_ragged_rows_equal_single_rows_then_decode_together(config):
    totals = [sum(row) for row in zip(*RAGGED, strict=True)]  # they wrap at different times
    rows = [random_tokens(n + 4, seed=20 + n) for n in totals]
    cache = network(config).new_cache(B, max(totals) + 4)
    parts = logits_ragged(network(config), rows, RAGGED, cache)
    decoded = logits_in_chunks(network(config), torch.stack([row[-4:] for row in rows]), [1, 1, 1, 1], cache)
    for row, part, tail in zip(rows, parts, decoded, strict=True):
        assert_equal(torch.cat((*part, tail)), logits(config, row[None])[0])


@some_mixers
@given(data=st.data())
def test_ragged_rows_equal_single_rows_for_random_lengths(config, data):
    n_rows = data.draw(st.integers(1, B), label="rows")
    lengths = data.draw(st.lists(st.lists(st.integers(0, 7), min_size=n_rows, max_size=n_rows), max_size=4), label="n")
    tail = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="uniform chunks after them")
    totals = [sum(row) for row in zip(*lengths, strict=True)] or [0] * n_rows
    rows = [random_tokens(n + sum(tail), seed=20 + b) for b, n in enumerate(totals)]
    cache = network(config).new_cache(n_rows, max(map(len, rows)))
    parts = logits_ragged(network(config), rows, lengths, cache)
    uniform = torch.stack([row[len(row) - sum(tail) :] for row in rows])
    decoded = logits_in_chunks(network(config), uniform, tail, cache)
    for row, part, rest in zip(rows, parts, decoded, strict=True):
        assert_equal(torch.cat((*part, rest)), logits(config, row[None])[0])


@some_mixers
def test_one_padded_row_then_a_chunk_longer_than_the_ring(config):
    row = random_tokens(20)
    cache = network(config).new_cache(1, 20)
    (first,) = logits_ragged(network(config), [row], [[1], [1]], cache)
    rest = logits_in_chunks(network(config), row[None, 2:], [9, 9], cache)
    assert_equal(torch.cat((*first, rest[0])), logits(config, row[None])[0])


@some_mixers
def test_padded_rows_equal_single_rows_without_a_cache(config):
    lengths, idx = torch.tensor([4, T, 9]), random_tokens(B, T)
    with torch.no_grad():
        padded = network(config)(idx, lengths=lengths)
    assert padded.isfinite().all()
    for row, n, out in zip(idx, lengths, padded, strict=True):
        assert_equal(out[:n], logits(config, row[None, :n])[0])


@some_mixers
def test_pads_are_never_stored(config):
    caches = [network(config).new_cache(B, 20) for _ in range(2)]
    rows = list(random_tokens(B, 20))
    for seed, kept in zip((2, 102), caches, strict=True):
        logits_ragged(network(config), rows, RAGGED, kept, junk_seed=seed)
    for one, other in zip(*map(tensors_of, caches), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=100)
@given(
    design=designs, sizes=st.lists(st.integers(1, 9), max_size=20), spare=st.integers(0, 7), t=st.integers(1, 2 * T - 1)
)
def test_every_design_is_causal_and_decodes_as_it_trains_in_the_bytes_predicted(design, sizes, spare, t):
    assert_contract(tiny_config(**design), random_tokens(2, 2 * T), sizes, t=t, spare=spare)


@settings(max_examples=100)
@given(design=designs, prompts=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
def test_ragged_rows_of_every_design_equal_single_rows(design, prompts):
    model, rows = tiny_model(tiny_config(**design)), random_tokens(3, 2 * T)
    cache = model.new_cache(3, 2 * T)
    parts = logits_ragged(model, list(rows), [prompts], cache)
    n = 2 * T - max(prompts)
    tails = torch.stack([row[p : p + n] for row, p in zip(rows, prompts, strict=True)])
    decoded = logits_in_chunks(model, tails, [1, 8], cache)
    for row, p, part, tail in zip(rows, prompts, parts, decoded, strict=True):
        assert_equal(torch.cat((*part, tail)), model(row[None, : p + n])[0].detach())


@settings(max_examples=100)
@given(design=designs)
def test_every_parameter_of_every_design_gets_a_gradient(design):
    model, idx = tiny_model(tiny_config(**design)), random_tokens(B, T + 1)
    model(idx[:, :-1], idx[:, 1:]).backward()
    for name, p in model.named_parameters():
        blind = any(part in name for part in ("q_norm", "k_norm", "c_q", "c_k"))  # where a query sees one key
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert blind or p.grad.any(), name


@each_mixer
@pytest.mark.parametrize("max_length", [1, 3, T, 40])
def test_predicted_cache_bytes_are_allocated(config, max_length):
    cache = network(config).new_cache(B, max_length, dtype=torch.bfloat16)
    predicted = cache_bytes(config, max_length, batch_size=B, dtype=torch.bfloat16)
    assert predicted == cache.nbytes == sum(x.nbytes for x in tensors_of(cache))


@each_mixer
def test_cache_bytes_do_not_change_with_use(config):
    cache = network(config).new_cache(B, T)
    before = cache.nbytes
    logits_in_chunks(network(config), random_tokens(B, T), [9, 1, 3], cache)
    assert before == cache.nbytes == sum(x.nbytes for x in tensors_of(cache))


@each_mixer
def test_every_parameter_gets_a_gradient(config):
    model, idx = tiny_model(config), random_tokens(B, T + 1)
    model(idx[:, :-1], idx[:, 1:]).backward()
    blind = config.window == 1 and not config.n_sink  # one visible key: its score does not matter
    for name, p in model.named_parameters():
        if not (blind and any(part in name for part in ("q_norm", "k_norm", "c_q", "c_k"))):
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


@each_mixer
def test_last_only_is_the_last_slice(config):
    idx = random_tokens(B, T)
    with torch.no_grad():
        assert_equal(network(config)(idx, last_only=True), logits(config, idx)[:, -1:])


@some_mixers
def test_last_only_is_each_rows_last_real_token(config):
    idx, lengths = random_tokens(B, T), torch.tensor([5, T, 1])
    with torch.no_grad():
        got = network(config)(idx, lengths=lengths, last_only=True)
    assert_equal(got[:, 0], logits(config, idx)[range(B), lengths - 1])


@some_mixers
@torch.no_grad()
def test_loss_with_a_cache_equals_loss_without(config):
    model, idx, targets = network(config), random_tokens(B, T), random_tokens(B, T, seed=9)
    cache = model.new_cache(B, T)
    chunks = zip(idx.split(5, dim=1), targets.split(5, dim=1), strict=True)
    losses = torch.cat([model(x, y, cache, reduction="none") for x, y in chunks], dim=1)
    assert_equal(losses, model(idx, targets, reduction="none"))
