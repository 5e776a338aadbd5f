"""A batch of prompts of different lengths against each of them alone, whatever the chunks and the dtype."""

import math
from itertools import islice

import pytest
import torch
from conftest import ROOT, random_tokens
from networks import make_sampler, tiny_config, tiny_model

from configs.load import load
from inference.cache_parity import cache_parity
from inference.sampling import chunks, pad_right, stream
from model.cache import KVCache
from model.gpt import GPT

W, N = 4, 14
LENGTHS = [1, 3, 4, 5, 7, 8, 11, 3 * W]
CONFIGS = sorted(ROOT.glob("configs/*.toml"))
MODELS = {
    "5:1": {"pattern": "5:1", "n_layer": 6},
    "sliding with sinks": {"pattern": "swa", "n_sink": 2},
    "full": {"pattern": "full", "window": None},
    "in the cache": {"pattern": "swa", "n_sink": 2, "rope_in_cache": True},
}
each_model = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)


def network(overrides: dict, dtype=torch.float64) -> GPT:
    return tiny_model(tiny_config(**{"window": W} | overrides), dtype=dtype)


def prompts() -> list[list[int]]:
    return [random_tokens(n, seed=50 + n).tolist() for n in LENGTHS]


def texts() -> list[list[int]]:
    """Prompts and what follows them, of which some ends sooner."""
    return [prompt + random_tokens(N - n % 3, seed=n).tolist() for n, prompt in enumerate(prompts())]


@each_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("chunk", [*range(1, W + 3), 512])
def test_logits_of_a_batch_are_those_of_single_runs(overrides, chunk, dtype, tolerance):
    found = cache_parity(network(overrides, dtype), texts(), LENGTHS, chunk=chunk)
    if overrides.get("rope_in_cache"):
        tolerance = max(tolerance, 1e-5)  # one distance, from different places, by float32 cos and sin
    assert found.difference < tolerance
    assert found.n_same == found.n_positions == sum(map(len, texts()))


@each_model
@pytest.mark.parametrize("sampler", [{"temperature": 0}, {"temperature": 1.2, "seed": 3, "repetition_penalty": 1.1}])
@pytest.mark.parametrize("chunk", [1, 3, W, W + 1, 512])
def test_tokens_of_a_batch_are_those_of_single_runs(overrides, sampler, chunk):
    model, draw = network(overrides), make_sampler(**sampler)
    idx, lengths = pad_right(prompts(), torch.device("cpu"))
    cache = model.new_cache(len(idx), 3 * W + N)
    together = torch.stack(list(islice(stream(model, cache, idx, draw, lengths=lengths, chunk=chunk), N)), dim=1)
    for row, prompt in zip(together, prompts(), strict=True):
        alone = stream(model, model.new_cache(1, len(prompt) + N), torch.tensor([prompt]), draw)
        assert row.tolist() == [int(token) for token in islice(alone, N)]


def test_bfloat16_reports_how_often_the_likeliest_token_agrees():
    found = cache_parity(network(MODELS["5:1"], torch.bfloat16), texts(), LENGTHS)
    assert 0 < found.difference < 0.1 * found.largest
    assert 0.9 * found.n_positions < found.n_same <= found.n_positions


def test_disagreement_is_found(monkeypatch):
    update = KVCache.update
    monkeypatch.setattr(KVCache, "update", lambda self, k, v, step: update(self, k, v * 1.01, step))
    found = cache_parity(network(MODELS["5:1"]), texts(), LENGTHS)
    assert found.difference > 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_decodes_as_it_computes_without_a_cache(path):
    """Cut to two layers, one of each kind where it has two."""
    config = load(path).model
    kinds = " ".join(dict.fromkeys(config.kinds))
    config = config.model_copy(update={"n_layer": 2, "pattern": kinds, "vocab_size": 97, "dropout": 0.0})
    torch.manual_seed(0)
    model = GPT(config).eval()
    n = min(3 * (config.window or 8), config.block_size - 9)
    together = [random_tokens(length + 9).tolist() for length in (1, n // 3, n)]
    found = cache_parity(model, together, [1, n // 3, n], chunk=config.window or 7)
    assert found.difference < 1e-4 * max(1.0, found.largest)


def test_rows_are_padded_on_the_right_and_counted():
    idx, lengths = pad_right([[5, 6, 7], [8], [9, 10]], torch.device("cpu"))
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert lengths.tolist() == [3, 1, 2]
    assert pad_right([[5, 6], [7, 8]], torch.device("cpu"))[1] is None


def test_chunks_count_the_real_tokens_of_each_row():
    idx, lengths = pad_right([[5, 6, 7, 8, 9], [8], [9, 10]], torch.device("cpu"))
    parts = [(part.shape[1], here.tolist()) for part, here in chunks(idx, lengths, 2)]
    assert parts == [(2, [2, 1, 2]), (2, [2, 0, 0]), (1, [1, 0, 0])]


def test_a_logit_that_is_no_number_is_no_parity():
    model = network(MODELS["5:1"])
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    assert math.isnan(cache_parity(model, texts(), LENGTHS).difference)
