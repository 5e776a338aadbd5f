"""Costs by arithmetic against what PyTorch counts and allocates."""

from unittest.mock import patch

import pytest
import torch
from conftest import random_tokens
from hypothesis import given
from hypothesis import strategies as st
from networks import designs, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention import dispatch
from model.attention.mask import attention_mask
from model.attention.spec import AttentionSpec
from model.config import ModelConfig
from model.cost import cache_bytes, n_params, train_flops
from model.gpt import GPT

B, T = 3, 13


@given(shape=designs, n_embd=st.sampled_from([20, 24]), mlp_width=st.sampled_from([None, 28]))
def test_predicted_parameters_are_those_of_the_network(shape, n_embd, mlp_width):
    config = tiny_config(**shape, n_embd=n_embd, mlp_width=mlp_width)
    assert n_params(config) == sum(p.numel() for p in GPT(config).parameters())


def test_gpt2_has_124_million_parameters():
    gpt2 = ModelConfig(
        vocab_size=50257,
        block_size=1024,
        n_layer=12,
        n_head=12,
        n_embd=768,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        qk_norm=False,
    )
    assert n_params(gpt2) == 124_439_808


@pytest.mark.parametrize("n_sink", [0, 1, 3, 20])
@pytest.mark.parametrize("window", [None, 1, 2, 4, T - 1, T, T + 1])
def test_pairs_are_those_that_are_visible(window, n_sink):
    spec = AttentionSpec(n_embd=20, n_head=6, n_kv_head=2, head_dim=8, window=window, n_sink=n_sink)
    pos = torch.arange(T)[None]
    assert spec.n_pairs(T) == attention_mask(pos, pos, spec).sum()


def counted_flops(config: ModelConfig, *, backward: bool) -> int:
    """What PyTorch counts for one batch when attention is two matrix products over all T x T pairs."""
    network, idx = tiny_model(config), random_tokens(B, T)
    masked = patch.object(dispatch, "kernel_for", lambda spec, call: "masked")
    with masked, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = network(idx)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def hidden_pairs_flops(config: ModelConfig) -> int:
    """What a kernel without masks spends on pairs that nobody sees."""
    return sum(4 * (T * T - spec.n_pairs(T)) * spec.n_head * spec.head_dim for spec in config.layers)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize("pattern", ["full", "swa full"])
def test_train_flops_are_those_that_pytorch_counts(pattern, n_kv_head, mlp):
    config = tiny_config(pattern=pattern, window=4, n_sink=1, n_kv_head=n_kv_head, mlp=mlp, bias=True)
    assert B * (train_flops(config, T) + 3 * hidden_pairs_flops(config)) == counted_flops(config, backward=True)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_train_flops_of_gates_are_those_that_pytorch_counts(gate):
    config = tiny_config(pattern="swa full", window=4, attn_gate=gate, sink_logit=True, attn_softcap=2.0, mlp="geglu")
    assert B * (train_flops(config, T) + 3 * hidden_pairs_flops(config)) == counted_flops(config, backward=True)


@pytest.mark.parametrize("pattern", ["full", "swa full"])
def test_training_costs_three_forward_passes(pattern):
    config = tiny_config(pattern=pattern, window=4, n_sink=1)
    forward = counted_flops(config, backward=False) - B * hidden_pairs_flops(config)
    assert B * train_flops(config, T) == 3 * forward


def test_forward_flops_of_a_layer_by_hand():
    spec = AttentionSpec(n_embd=20, n_head=6, n_kv_head=2, head_dim=8, window=4)
    projections = 2 * T * 20 * (48 + 16 + 16 + 48)
    scores_and_values = 2 * 2 * (4 * T - 6) * 48
    assert spec.forward_flops(T) == projections + scores_and_values


@pytest.mark.parametrize(
    ("n_kv_head", "pattern", "gigabytes"),
    [(32, "full", 17.18), (8, "full", 4.29), (32, "5:1", 3.14), (8, "5:1", 0.78)],
    ids=["MHA", "GQA", "MHA + 5:1", "GQA + 5:1"],
)
def test_cache_bytes_of_a_large_model_are_the_published_ones(n_kv_head, pattern, gigabytes):
    config = ModelConfig(n_layer=32, n_head=32, n_kv_head=n_kv_head, n_embd=4096, pattern=pattern, window=1024)
    assert config.kinds.count("full") == (32 if pattern == "full" else 5)
    assert round(cache_bytes(config, 32768) / 1e9, 2) == gigabytes


def test_cache_bytes_by_hand():
    config = tiny_config(pattern="swa full", window=4, n_sink=3, n_kv_head=2, head_dim=8)
    slots = (3 + 4) + 40
    assert cache_bytes(config, 40, batch_size=5, dtype=torch.float64) == 5 * 2 * slots * 2 * 8 * 8


@given(shape=designs, max_length=st.integers(1, 40), batch_size=st.integers(1, 4))
def test_predicted_cache_bytes_are_allocated(shape, max_length, batch_size):
    config = tiny_config(**shape)
    cache = GPT(config).new_cache(batch_size, max_length)
    assert cache.nbytes == cache_bytes(config, max_length, batch_size=batch_size, dtype=torch.float32)
