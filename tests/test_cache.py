"""The rolling cache against a cache that remembers everything, and against one that replays writes one by one."""

import pytest
import torch
from conftest import assert_equal, logits_in_chunks, logits_ragged, random_tokens
from hypothesis import example, given
from hypothesis import strategies as st
from networks import tiny_config, tiny_model
from torch import Tensor

from model.cache import KVCache, n_slots, slot_positions
from model.context import EMPTY, PADDING, ForwardContext
from model.errors import UserError

K, D = 2, 5


def replayed_slots(n_seen: int, slots: int, n_sink: int) -> list[int]:
    """The positions in the slots after n_seen writes, each into a free slot or that of the oldest but the sinks."""
    held = [EMPTY] * slots
    for pos in range(n_seen):
        free = [s for s in range(slots) if held[s] == EMPTY]
        held[free[0] if free else held.index(min(p for p in held if p >= n_sink))] = pos
    return held


@pytest.mark.parametrize("n_sink", [0, 1, 3])
@pytest.mark.parametrize("ring", [1, 2, 5])
def test_slot_positions_match_writes_one_by_one(ring, n_sink):
    slots = n_sink + ring
    n_seen = list(range(4 * slots))
    expected = [replayed_slots(n, slots, n_sink) for n in n_seen]
    assert slot_positions(torch.tensor(n_seen), slots, n_sink).tolist() == expected


@pytest.mark.parametrize(("window", "n_sink", "max_length"), [(4, 3, 20), (4, 0, 20), (4, 3, 5), (1, 3, 3), (9, 2, 11)])
def test_sliding_layer_holds_window_and_sinks_or_all(window, n_sink, max_length):
    model = tiny_model(tiny_config(pattern="swa", window=window, n_sink=n_sink))
    expected = min(max_length, n_sink + window)
    assert [layer.k.shape for layer in model.new_cache(3, max_length).layers] == [(3, K, expected, 8)] * 2
    assert n_slots(window, n_sink, max_length) == expected


def test_full_layer_holds_max_length():
    model = tiny_model(tiny_config(pattern="swa full", window=4, n_sink=1))
    assert [layer.k.shape[2] for layer in model.new_cache(3, 20).layers] == [5, 20]


@pytest.mark.parametrize("sizes", [[13], [1] * 13, [6, 7]], ids=["one shot", "ones", "halves"])
def test_cache_that_does_not_roll_keeps_every_key_and_gives_the_same(sizes):
    model, idx = tiny_model(tiny_config(pattern="swa full", window=4, n_sink=1)), random_tokens(3, 13)
    cache = model.new_cache(3, 13, rolling=False)
    assert_equal(logits_in_chunks(model, idx, sizes, cache), model(idx).detach())
    assert [layer.k.shape[2] for layer in cache.layers] == [13, 13]
    assert cache.max_length == 13


def test_cache_has_the_weights_dtype_unless_another_is_given():
    model = tiny_model(tiny_config(), dtype=torch.float32)
    assert model.new_cache(1, 5).layers[0].k.dtype == torch.float32
    assert model.new_cache(1, 5, dtype=torch.bfloat16).layers[0].k.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [13, 4, 1])
def test_cache_of_another_dtype_rounds_keys_and_values_alone(size):
    model, idx = tiny_model(tiny_config(pattern="swa full", window=4)), random_tokens(3, 13)
    rounded = logits_in_chunks(model, idx, [size] * 12, model.new_cache(3, 13, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float64
    assert_equal(rounded, logits_in_chunks(model, idx, [5] * 3, model.new_cache(3, 13, dtype=torch.bfloat16)))
    assert_equal(rounded, model(idx).detach(), 0.1)


@pytest.mark.parametrize("pattern", ["full", "swa full"])
def test_too_many_tokens_for_the_cache_is_a_clear_error(pattern):
    model = tiny_model(tiny_config(pattern=pattern, window=4))
    cache = model.new_cache(3, 9)
    assert cache.max_length == 9
    logits_in_chunks(model, random_tokens(3, 8), [5, 3], cache)
    with pytest.raises(UserError, match=r"^10 tokens are more than the 9 of the cache \(max_length\); make it larger$"):
        model(random_tokens(3, 2), cache=cache)


def test_refused_chunk_leaves_the_cache_as_it_was():
    model, idx = tiny_model(tiny_config()), random_tokens(3, 9)
    cache = model.new_cache(3, 9)
    logits_in_chunks(model, idx[:, :6], [6], cache)
    with pytest.raises(UserError):
        model(random_tokens(3, 4), cache=cache)
    assert_equal(logits_in_chunks(model, idx[:, 6:], [2, 1], cache), logits_in_chunks(model, idx, [9])[:, 6:])


@pytest.mark.parametrize("lengths", [[[4, 9, 0]], [[4, 4, 0], [0, 5, 4], [5, 0, 5]]], ids=str)
def test_pads_take_no_room(lengths):
    model, idx = tiny_model(tiny_config()), random_tokens(3, 9)
    logits_ragged(model, list(idx), lengths, cache := model.new_cache(3, 9))
    assert cache.pos.tolist() == [sum(row) for row in zip(*lengths, strict=True)]
    with pytest.raises(UserError, match="10 tokens are more than the 9 of the cache"):
        model(random_tokens(3, 1), cache=cache)


@pytest.mark.parametrize("n_sink", [0, 3])
def test_all_sliding_cache_goes_on_for_ever(n_sink):
    model, idx = tiny_model(tiny_config(pattern="swa", window=4, n_sink=n_sink)), random_tokens(3, 90)
    cache = model.new_cache(3, 10)
    assert cache.max_length is None
    logits = logits_in_chunks(model, idx, [17, 1, 1, 8] + [13] + [1] * 50, cache)
    assert_equal(logits, model(idx).detach())


def test_sliding_cache_too_short_to_roll_says_its_length():
    model = tiny_model(tiny_config(pattern="swa", window=4, n_sink=3))
    assert model.new_cache(3, 6).max_length == 6
    assert model.new_cache(3, 7).max_length is None


@pytest.mark.parametrize("pattern", ["swa", "swa full"])
def test_nothing_is_reallocated(pattern):
    model = tiny_model(tiny_config(pattern=pattern, window=4, n_sink=1))
    cache = model.new_cache(3, 40)
    memory = lambda: [(x.data_ptr(), x.shape) for layer in cache.layers for x in (layer.k, layer.v)]
    before, pos = memory(), cache.pos.data_ptr()
    logits_in_chunks(model, random_tokens(3, 40), [7, 1, 6, 1, 1] + [4] + [1] * 20, cache)
    cache.reset()
    assert memory() == before
    assert cache.pos.data_ptr() == pos


def test_what_a_reset_cache_still_holds_is_never_seen():
    model, idx = tiny_model(tiny_config(pattern="swa full", window=4, n_sink=1)), random_tokens(3, 9)
    clean, dirty = model.new_cache(3, 9), model.new_cache(3, 9)
    for layer in dirty.layers:
        layer.k.fill_(1e30)
        layer.v.fill_(1e30)
    lengths = [[2, 0, 4], [1, 3, 0]]
    for one, other in zip(*(logits_ragged(model, list(idx), lengths, c) for c in (clean, dirty)), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))


@pytest.mark.parametrize("lengths", [None, [9, 4, 0]], ids=["uniform", "ragged"])
@pytest.mark.parametrize("n_sink", [0, 3])
def test_no_slot_is_written_twice_in_a_pass(monkeypatch, n_sink, lengths):
    slots = []  # of each write; where two go to one slot, a GPU may keep either
    for name, pick in {"index_copy_": lambda at: at, "scatter_": lambda at: at[0, 0, :, 0]}.items():
        original = getattr(Tensor, name)
        record = lambda self, dim, at, x, original=original, pick=pick: (
            slots.append(pick(at)) or original(self, dim, at, x)
        )
        monkeypatch.setattr(Tensor, name, record)
    model = tiny_model(tiny_config(pattern="swa", window=4, n_sink=n_sink))
    cache = model.new_cache(3, 30)
    with torch.no_grad():
        for T in (9, 9, 1):
            model(random_tokens(3, T), cache=cache, lengths=torch.tensor(lengths) if lengths and T == 9 else None)
    assert slots
    assert all(len(at.unique()) == len(at) for at in slots)


def test_reset_cache_says_that_it_is_empty():
    model = tiny_model(tiny_config())
    logits_ragged(model, list(random_tokens(3, 9)), [[5, 0, 3]], cache := model.new_cache(3, 9))
    cache.reset()
    assert (cache.pos.tolist(), cache.length, cache.ragged) == ([0, 0, 0], 0, False)


def make_step(past: list[int], added: list[int] | int, T: int, *, past_bound: int, ragged: bool) -> ForwardContext:
    """What GPT says of a chunk: rows that have seen `past`, and take T tokens or, padded, `added` of them."""
    padded = not isinstance(added, int)
    seen = torch.tensor(past if ragged else past[:1])
    pos = seen[:, None] + torch.arange(T)
    if padded:
        pos = torch.where(torch.arange(T) < torch.tensor(added)[:, None], pos, PADDING)
    return ForwardContext(
        pos=pos,
        contiguous=not padded and past_bound == 0,
        padded=padded,
        uniform=not (padded or ragged),
        past=seen,
        added=torch.tensor(added),
        past_bound=past_bound,
    )


def value_of(b: int, pos: int) -> float:
    return 1000.0 * (b + 1) + pos


def chunk_of(past: list[int], added: list[int], T: int) -> Tensor:
    """(B, K, T, D) keys that say their row and position, -7 on the pads."""
    x = torch.full((len(past), K, T, D), -7.0)
    for b, (start, n) in enumerate(zip(past, added, strict=True)):
        for t in range(n):
            x[b, :, t] = value_of(b, start + t) + torch.arange(K * D).view(K, D) / 100
    return x


LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=3, max_size=3)), max_size=9)


@given(window=st.none() | st.integers(1, 7), n_sink=st.integers(0, 4), room=st.integers(1, 12), chunks=LENGTHS)
@example(window=4, n_sink=3, room=12, chunks=[[1, 9, 0], 9, [9, 0, 3], 1, 1, [0, 0, 0], 5])
@example(window=1, n_sink=3, room=12, chunks=[2, [9, 1, 5], 9, 1])
def test_cache_gives_queries_what_a_dictionary_remembers(window, n_sink, room, chunks):
    rolls = window is not None and n_sink + window <= room
    max_length = room if rolls else 90
    slots = n_slots(window, n_sink if window else 0, max_length)
    k, v = torch.zeros(3, K, slots, D), torch.zeros(3, K, slots, D)
    cache = KVCache(k, v, n_sink=n_sink if window else 0, max_length=None if rolls else max_length)
    past, past_bound, ragged = [0, 0, 0], 0, False
    for chunk in chunks:
        added = [chunk] * 3 if isinstance(chunk, int) else chunk
        T = max(1, *added)
        ragged |= not isinstance(chunk, int)
        step = make_step(past, chunk, T, past_bound=past_bound, ragged=ragged)
        new = chunk_of(past, added, T)
        got_k, got_v, k_pos = cache.update(new, new + 0.5, step)
        assert got_k.shape == got_v.shape == (3, K, k_pos.shape[1], D)
        for b in range(3):
            positions = k_pos[b if len(k_pos) > 1 else 0].tolist()
            assert (added[b] == T) or PADDING in positions, "a pad sees nothing"
            real = {p: i for i, p in enumerate(positions) if p >= 0}
            assert len(real) == sum(p >= 0 for p in positions), "a position is there twice"
            for pos in range(past[b], past[b] + added[b]):
                seen = [j for j in range(pos + 1) if window is None or pos - j < window or j < n_sink]
                assert set(seen) <= set(real), f"row {b} at {pos} misses keys"
            for pos, i in real.items():
                assert got_k[b, 0, i, 0] == value_of(b, pos)
                assert got_v[b, K - 1, i, D - 1] == pytest.approx(value_of(b, pos) + 0.5 + (K * D - 1) / 100)
        past, past_bound = [p + n for p, n in zip(past, added, strict=True)], past_bound + T
        for b, row in enumerate(slot_positions(torch.tensor(past), slots, cache.n_sink).tolist()):
            assert row == replayed_slots(past[b], slots, cache.n_sink)
            stored = cache.k[b, 0, :, 0].tolist()
            assert stored == [0.0 if pos == EMPTY else value_of(b, pos) for pos in row]
