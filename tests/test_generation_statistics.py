"""What generating cost, against counts made by hand."""

import re

import pytest
import torch
from conftest import random_tokens
from networks import make_sampler, tiny_config, tiny_model

from inference import statistics as module
from inference.sampling import stream
from inference.statistics import GenerationStatistics
from model.attention.mask import attention_mask
from model.cost import cache_bytes, n_params, read_bytes, step_bytes
from model.device import resolve

SLIDING = {"pattern": "swa full", "window": 4, "n_sink": 2}


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 9), (3, 4), (5, 12), (30, 31)])
def test_bytes_read_are_those_of_the_keys_and_values_that_the_queries_see(start, stop):
    config = tiny_config(**SLIDING)
    pos = torch.arange(stop)[None]
    seen = sum(int(attention_mask(pos[:, start:], pos, spec).sum()) for spec in config.layers)
    assert read_bytes(config, start, stop, torch.bfloat16) == seen * 2 * 2 * 8 * 2  # k and v, heads, width, bytes
    everything = sum(range(start + 1, stop + 1)) * 2  # layers
    assert read_bytes(config, start, stop, torch.bfloat16, rolling=False) == everything * 2 * 2 * 8 * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_step_reads_every_weight_but_the_embeddings_that_it_looks_up(tied, position):
    config = tiny_config(tie_embeddings=tied, position=position, bias=True, norm="layernorm")
    looked_up = (config.vocab * (not tied) + config.block_size * (position == "learned")) * config.n_embd
    assert step_bytes(tiny_model(config)) == 8 * (n_params(config) - looked_up)


def test_speeds_are_tokens_that_were_waited_for_over_the_seconds_they_took(clock):
    model, runtime = tiny_model(tiny_config(**SLIDING), dtype=torch.float32), resolve("cpu", "float32")
    meter = GenerationStatistics(model, model.new_cache(2, 40), runtime, n_samples=3)
    meter.begin([5, 7])
    for seconds, n_live in ((0.5, 6), (0.25, 6), (0.25, 4)):
        clock(seconds)
        meter.count(n_live)
    meter.end()
    prefill, decode, cache, _ = meter.lines()
    assert prefill == "prefill 12 tokens at 24 tokens/s, first token after 500 ms"
    weights = 2 * step_bytes(model)
    rows = 3 * (read_bytes(model.config, 5, 7, torch.float32) + read_bytes(model.config, 7, 9, torch.float32))
    assert meter.bytes_read == weights + rows
    assert decode == f"decode 10 tokens at 20.0 tokens/s, {(weights + rows) / 0.5 / 1e9:.2f} GB/s of weights and cache"
    swa, full = (6 * spec.cache_bytes(40, torch.float32) for spec in model.config.layers)
    assert cache == f"cache {swa + full:,} bytes: swa {swa:,}, full {full:,}"
    assert swa + full == cache_bytes(model.config, 40, batch_size=6, dtype=torch.float32)


def test_turns_add_up_and_the_first_token_is_that_of_the_first_turn(clock):
    model, runtime = tiny_model(tiny_config(), dtype=torch.float32), resolve("cpu", "float32")
    meter = GenerationStatistics(model, model.new_cache(1, 40), runtime)
    for past, n in ((0, 4), (6, 8)):
        meter.begin([n], past=past)
        for seconds in (n, 1, 1):
            clock(seconds)
            meter.count(1)
        meter.end()
    assert meter.lines()[0] == "prefill 12 tokens at 1 tokens/s, first token after 4000 ms"
    assert meter.lines()[1].startswith("decode 4 tokens at 1.0 tokens/s")
    kv = sum(read_bytes(model.config, t, t + 2, torch.float32) for t in (4, 14))
    assert meter.bytes_read == kv + 4 * step_bytes(model)


def test_what_was_not_measured_is_not_said():
    model = tiny_model(tiny_config(), dtype=torch.float32)
    meter = GenerationStatistics(model, None, resolve("cpu", "float32"))
    meter.begin([3])
    meter.end()
    first, second = meter.lines()
    assert first == "no cache"
    assert re.fullmatch(r"peak memory \d+ MiB \(process\)", second)


def test_the_bytes_of_the_samples_are_those_of_their_forked_cache(monkeypatch):
    model = tiny_model(tiny_config(**SLIDING), dtype=torch.float32)
    cache = model.new_cache(1, 40)
    forked = []
    fork = type(cache).fork
    monkeypatch.setattr(type(cache), "fork", lambda self, n: (forked.append(fork(self, n)), forked[-1])[1])
    next(stream(model, cache, random_tokens(1, 5), make_sampler(), n_samples=4))
    meter = GenerationStatistics(model, cache, resolve("cpu", "float32"), n_samples=4)
    assert sum(meter.cache_bytes.values()) == forked[0].nbytes
