"""Texts far longer than any training context: constant memory, and positions that stay right."""

import gc
import math
from itertools import islice
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import assert_equal, logits_in_chunks, random_tokens
from networks import make_sampler, tiny_config, tiny_model

from inference.sampling import prefill, stream
from model.attention import rope as positions
from model.attention.rope import Rope, angles, angles_in_integers
from model.memory import measure_peak

CPU = torch.device("cpu")
W = 4
FAR = 10**6
POSITIONS = torch.tensor([0, 1, 1000, FAR, FAR + 1, 123_456_789, 2**32 - 1])


def whole_turns_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((torch.exp(1j * a.double()) - torch.exp(1j * b.double())).abs().max())


# Angles.


def exact_angle(pos: int, m: int, width: int, base: float) -> float:
    """In integers of 200 bits, as Python has them."""
    turns = int(base ** (-2 * m / width) / (2 * math.pi) * 2**200)  # the float64 frequency, exactly
    return (pos * turns % 2**200) / 2**200 * 2 * math.pi


@pytest.mark.parametrize(("way", "tolerance"), [(angles, 1e-5), (angles_in_integers, 2e-6)])
def test_angles_are_right_at_any_position(way, tolerance):
    frequency = 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    expected = torch.tensor([[exact_angle(p, m, 64, 1e4) for m in range(32)] for p in POSITIONS.tolist()])
    assert whole_turns_apart(way(POSITIONS[:, None], frequency), expected) < tolerance


def test_float32_angles_are_not():
    frequency = 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (
        whole_turns_apart(POSITIONS[4, None].float() * frequency.float(), angles(POSITIONS[4, None], frequency)) > 0.01
    )


def test_a_device_without_float64_has_the_same_table(monkeypatch):
    rope = Rope(base=1e4, width=64)
    expected = rope.table(POSITIONS[None, :5])
    monkeypatch.setattr(positions, "angles", angles_in_integers)
    monkeypatch.setattr(torch.Tensor, "double", lambda self: pytest.fail("this device has no float64"))
    for found, table in zip(rope.table(POSITIONS[None, :5]), expected, strict=True):
        assert_equal(found, table, 1e-6)


def test_a_pads_angle_is_finite_in_integers():
    assert angles_in_integers(torch.tensor([-1, -2]), torch.tensor([1.0, 0.1], dtype=torch.float64)).isfinite().all()


def test_a_device_that_says_it_is_mps_counts_in_integers(monkeypatch):
    called = []
    monkeypatch.setattr(positions, "angles_in_integers", lambda pos, frequency: called.append(frequency.dtype))
    positions.angles(SimpleNamespace(device=SimpleNamespace(type="mps")), torch.ones(1, dtype=torch.float64))
    assert called == [torch.float64]


def sliding(**overrides):
    return tiny_model(tiny_config(pattern="swa", window=W, **overrides))


@torch.no_grad()
def test_logits_at_position_a_million_are_those_at_the_start():
    """Scores know distances alone, and two layers of 4 keys reach 6 back: the rest of the past changes nothing."""
    model, idx = sliding(), random_tokens(1, 40)
    cache = model.new_cache(1, 99)
    cache.pos.fill_(FAR)  # of which the slots hold zeros, soon out of reach
    cache.length = FAR
    logits = logits_in_chunks(model, idx, [7, 1, 1, 9] + [1] * 22, cache)
    assert_equal(logits[:, 10:], model(idx)[:, 10:], 1e-5)


# Memory.


def peak_of_prefill(model, n: int, chunk: int) -> int:
    """Bytes live at once, weights and prompt apart."""
    prompt = random_tokens(1, n)
    prefill(model, model.new_cache(1, n), prompt[:, : 3 * chunk], chunk=chunk)  # warm up
    with measure_peak(CPU) as peak:
        prefill(model, model.new_cache(1, n), prompt, chunk=chunk)
    assert peak.bytes is not None
    return peak.bytes


def test_an_all_sliding_model_reads_a_prompt_of_any_length_in_constant_memory():
    model = sliding(n_sink=1).float()
    assert peak_of_prefill(model, 4096, 64) == peak_of_prefill(model, 1024, 64)


def long_prompt_is_bounded(n: int) -> None:
    """The cache and pieces of a fixed size: never scores of all pairs, nor logits of all tokens."""
    bound, vocab_size = 24 << 20, 997
    assert min(n * n, n * vocab_size * 4) > bound
    config = tiny_config(pattern="5:1", n_layer=6, window=W, n_head=2, n_kv_head=1, vocab_size=vocab_size)
    model = tiny_model(config, dtype=torch.float32)
    assert peak_of_prefill(model, n, 256) - model.new_cache(1, n).nbytes < bound


@pytest.mark.slow
def test_a_long_prompt_takes_the_cache_and_pieces_of_a_fixed_size():
    long_prompt_is_bounded(12_000)


@pytest.mark.slow
def test_a_prompt_of_100_000_tokens_takes_the_cache_and_pieces_of_a_fixed_size():
    long_prompt_is_bounded(100_000)


def resident_after(counts: list[int], model) -> list[int]:
    """Bytes of this process after so many tokens of one text."""
    tokens = stream(model, model.new_cache(1, 99), random_tokens(1, 5), make_sampler())
    sizes, done = [], 0
    for n in counts:
        for _ in islice(tokens, n - done):
            pass
        done = n
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes


@pytest.mark.slow
def test_process_memory_does_not_grow_with_the_text():
    after_1k, after_3k = resident_after([1000, 3000], sliding(n_sink=1).float())
    assert after_3k - after_1k < 0.01 * after_1k  # a machine short of memory may take some back


@pytest.mark.slow
def test_process_memory_after_100_000_tokens_is_that_after_a_thousand():
    after_1k, after_100k = resident_after([1000, 100_000], sliding(n_sink=1).float())
    assert after_100k - after_1k < 0.01 * after_1k


@pytest.mark.slow
@torch.no_grad()
def test_a_million_tokens_end_in_the_logits_of_their_last_few():
    """Read in chunks and decoded one by one, by a cache of 4 slots a layer."""
    model, idx = sliding(), random_tokens(1, FAR)
    cache = model.new_cache(1, 99)
    before = cache.nbytes
    for chunk in idx[:, :-200].split(400, dim=1):
        model(chunk, cache=cache, last_only=True)
    tail = logits_in_chunks(model, idx[:, -200:], [1] * 200, cache)
    assert cache.nbytes == before
    assert int(cache.pos) == FAR
    assert_equal(tail, model(idx[:, -220:])[:, -200:], 1e-5)
