"""Eight bits: weights and caches lose what rounding loses, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal, logits_in_chunks, logits_ragged, random_tokens, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_config, tiny_model

from inference import compiled_decode as decode
from inference.quantize import Int8Linear, quantize
from model.cost import cache_bytes, read_bytes, step_bytes
from model.int8 import to_int8
from model.mixers import MIXERS

SIZES = {"window": 4, "n_sink": 1, "sparse_block": 3, "n_summary": 1, "star_context": 8, "head_windows": (2, 5)}
each_kind = pytest.mark.parametrize("kind", MIXERS)


def kept_in_int8(kind: str, *, rows: int = 3, room: int = 26):
    """A float64 network and its cache in 8 bits."""
    model = tiny_model(tiny_config(pattern=kind, **SIZES))
    return model, model.new_cache(rows, room, dtype=torch.int8)


@given(rows=st.integers(1, 9), scale=st.sampled_from([1e-6, 1.0, 1e5]), seed=st.integers(0, 99))
def test_rounding_is_off_by_half_a_step_and_that_of_the_scale(rows, scale, seed):
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed)) * scale
    whole, step = to_int8(x, torch.bfloat16)
    error = (whole.float() * step.float() - x).abs()
    assert (error <= step.float() * 1.01).all()  # bfloat16 may round the scale down: the largest is cut at 127 steps
    assert (error.median(dim=1).values <= 0.5 * step[:, 0].float()).all()


def test_zeros_stay_zeros():
    whole, step = to_int8(torch.zeros(2, 5), torch.bfloat16)
    assert not (whole.float() * step.float()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_linear_layer_is_that_of_its_rounded_weights(dtype, rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 1, 32), torch.randn(7, 32), torch.randn(7)
    whole, scale = to_int8(weight.to(dtype), dtype)
    linear = Int8Linear(whole, scale[:, 0], bias.to(dtype))
    wide = lambda y: y.to(torch.float64)
    expected = F.linear(wide(x.to(dtype)), wide(whole) * wide(scale), wide(bias.to(dtype)))
    assert_equal(wide(linear(x.to(dtype))), expected, {torch.bfloat16: 0.05, torch.float32: 1e-5}.get(dtype, 1e-12))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_network_in_int8_is_that_of_its_rounded_weights(tied):
    config = tiny_config(pattern="swa full", window=4, tie_embeddings=tied, mlp="gelu", bias=True, norm="layernorm")
    model, twin, idx = tiny_model(config), tiny_model(config), random_tokens(2, 13)
    quantize(model)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            twin.get_submodule(name.replace("wte.head", "lm_head")).weight.copy_(module.weight)
    assert_equal(model(idx), twin(idx))
    assert_equal(model(idx, idx), twin(idx, idx))
    assert_equal(logits_in_chunks(model, idx, [5] + [1] * 8), twin(idx))
    assert (model(idx) - tiny_model(config)(idx)).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_int8_are_a_byte_each_and_a_scale_a_row(tied):
    config = tiny_config(tie_embeddings=tied)
    model = quantize(tiny_model(config, dtype=torch.bfloat16))
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    saved = sum(x.int8.numel() - 2 * len(x.scale) for x in layers)
    assert step_bytes(model) == step_bytes(tiny_model(config, dtype=torch.bfloat16)) - saved


@each_kind
def test_the_bytes_of_an_int8_cache_are_those_predicted(kind):
    model, cache = kept_in_int8(kind)
    predicted = cache_bytes(model.config, 26, batch_size=3, dtype=torch.int8)
    assert predicted == cache.nbytes == sum(x.nbytes for x in tensors_of(cache))
    if kind != "linear":
        assert predicted / cache_bytes(model.config, 26, batch_size=3, dtype=torch.bfloat16) == (8 + 2) / 16
        assert read_bytes(model.config, 3, 9, torch.int8) / read_bytes(model.config, 3, 9, torch.bfloat16) == 10 / 16


@each_kind
@pytest.mark.parametrize("sizes", [[26], [1] * 26, [9, 1, 1, 7]], ids=["one shot", "ones", "mixed"])
def test_chunks_do_not_change_what_an_int8_cache_gives(kind, sizes):
    model, cache = kept_in_int8(kind)
    idx, (_, other) = random_tokens(3, 26), kept_in_int8(kind)
    got = logits_in_chunks(model, idx, sizes, cache)
    tolerance = 1e-4 if kind == "linear" else 1e-10  # its state is not rounded to int8 but to float32
    assert_equal(got, logits_in_chunks(model, idx, [5] * 6, other), tolerance)
    assert_equal(got, model(idx).detach(), 0.3)
    if kind != "linear":
        assert (got - model(idx)).abs().max() > 1e-4


def test_rows_of_an_int8_cache_are_their_own_and_can_be_forked():
    model, cache = kept_in_int8("swa full")
    rows = list(random_tokens(3, 26))
    logits_ragged(model, rows, [[4, 9, 7]], cache)
    tails = torch.stack([row[n : n + 12] for row, n in zip(rows, (4, 9, 7), strict=True)])
    forked = logits_in_chunks(model, tails.repeat_interleave(2, dim=0), [1] * 12, cache.fork(2))
    for row, n, tail in zip(rows, (4, 9, 7), forked[::2], strict=True):
        single = model.new_cache(1, 26, dtype=torch.int8)
        alone = logits_in_chunks(model, row[None, : n + 12], [5] * 6, single)
        assert_equal(tail, alone[0, n:], 1e-10)


@each_kind
def test_a_compiled_step_reads_an_int8_cache_as_a_plain_one_does(kind, monkeypatch):
    monkeypatch.setattr(decode, "compiled", lambda function: function)
    idx, logits = random_tokens(3, 26), []
    for on in (False, True):
        model, cache = kept_in_int8(kind)
        decode.use_compiled_decode(model, on)
        logits.append(logits_in_chunks(model, idx, [3] + [1] * 23, cache))
    assert_equal(logits[1], logits[0], 1e-10)
