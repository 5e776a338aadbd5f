"""Any values of any settings together: the contract of mixers holds, or one line says what does not go together."""

import pytest
import torch
from conftest import assert_contract, assert_equal, logits_ragged, random_tokens
from hypothesis import event, given, settings
from hypothesis import strategies as st
from networks import SMALL, by_kind, tiny_model
from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.mixers import MIXERS

T = 26
BASE = SMALL | {
    "block_size": T,
    "window": 5,
    "head_windows": (2, 5),
    "sparse_block": 3,
    "n_summary": 2,
    "star_context": 7,
    "rope_trained": 40,
}
VALUES = {  # what hypothesis may put in the place of that; some of it is wrong by itself, some beside something else
    "vocab_size": [31],
    "block_size": [T, 40],
    "n_layer": [1, 2, 3, 5],
    "n_head": [6, 2, 4, 5],
    "n_kv_head": [None, 1, 2, 3, 6],
    "n_embd": [20, 24],
    "head_dim": [8, 4, 7, None],
    "window": [1, 2, 9, 30, (3, 5, 1), (), (0,), None],
    "head_windows": [(), (3,), (2, 5), (2, 7, 4), (0, 1)],
    "window_everywhere": [None, 1, 4],
    "n_sink": [0, 1, 3, 30],
    "global_tokens": [(), (0,), (2, 9), (-1,)],
    "n_random": [0, 1, 3],
    "sparse_block": [None, 1, 2, 4, 30],
    "n_summary": [None, 1, 3],
    "star_context": [None, 0, 12, 99],
    "position": ["rope", "learned", "alibi", "none", by_kind("none", swa="rope"), by_kind("rope", full="alibi"), {}],
    "rope_base": [500.0, 1.0, -1.0, by_kind(100.0, full=1e4), {"swa": 1e4}],
    "rope_fraction": [1.0, 0.5, 0.3, 0.0, by_kind(1.0, full=0.5)],
    "rope_scaling": ["none", "linear", "yarn", "llama3", by_kind("none", full="yarn")],
    "rope_factor": [1.0, 4.0, 0.5, by_kind(1.0, full=4.0)],
    "rope_in_cache": [False, True],
    "rope_trained": [None, 1, 16],
    "rope_whole_ramp": [False, True],
    "qk_norm": [False, True],
    "qk_norm_over": ["head", "projection"],
    "attn_scale": [None, 0.2, 0.0],
    "attn_softcap": [None, 1.5],
    "sink_logit": [False, True],
    "attn_gate": ["none", "head", "channel"],
    "attn_bias": [None, "qkv", "all"],
    "logit_softcap": [None, 2.0],
    "norm": ["rmsnorm", "rmsnorm+1", "layernorm"],
    "norm_place": ["pre", "post", "sandwich"],
    "norm_eps": [1e-6, 1e-3],
    "mlp": ["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"],
    "mlp_width": [None, 28],
    "bias": [False, True],
    "tie_embeddings": [False, True],
    "scale_embeddings": [False, True],
    "init_std": [0.02, None],
    "kernel": ["auto", "sdpa", "tiles", "amx", "masked", "flex"],
    "dropout": [0.0, 0.3],
    "z_loss": [0.0, 0.01],
    "omits": [None, "its experts"],
    "loops": [1, 2],
}


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """A pattern of any words, and other values for some settings."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=12))
    pattern = " ".join(draw(st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3)))
    return BASE | {key: draw(st.sampled_from(VALUES[key])) for key in keys} | {"pattern": pattern}


any_chunks = given(
    shape=shapes(), sizes=st.lists(st.integers(1, 9), max_size=20), t=st.integers(1, T - 1), spare=st.integers(0, 7)
)


def test_every_setting_is_drawn():
    assert {*VALUES, "pattern"} == set(ModelConfig.model_fields)


@settings(max_examples=80)
@any_chunks
def test_a_config_holds_the_contract_or_has_its_line(shape, sizes, t, spare):
    check(shape, sizes, t, spare)


@pytest.mark.slow
@settings(max_examples=4000, derandomize=False)
@any_chunks
def test_very_many_configs_hold_the_contract_or_have_their_line(shape, sizes, t, spare):
    check(shape, sizes, t, spare)


def check(shape: dict, sizes: list[int], t: int, spare: int) -> None:
    try:
        config = ModelConfig(**shape)
    except ValidationError as refused:
        first = refused.errors()[0]
        line = f"{'.'.join(map(str, first['loc']))} {first['msg']}"
        assert "\n" not in line
        assert any(key in line for key in ModelConfig.model_fields), line
        event("refused")
        return
    try:
        assert_contract(config, random_tokens(2, T), sizes, t=t, spare=spare)
        assert_ragged(config, [t % 9, 1 + t % 4])
    except UserError as refused:
        line = str(refused)
        assert "\n" not in line
        assert line.startswith(f"kernel ({config.kernel}) "), line
        event("refused, the kernel")
        return
    event("holds")


@torch.no_grad()
def assert_ragged(config: ModelConfig, prompts: list[int]) -> None:
    """Rows that begin with as many tokens each, padded, and go on together, equal single rows."""
    model, rows = tiny_model(config), random_tokens(2, T)
    cache, n = model.new_cache(2, T), T - max(prompts)
    parts = logits_ragged(model, list(rows), [prompts], cache)
    tails = model(torch.stack([row[p : p + n] for row, p in zip(rows, prompts, strict=True)]), cache=cache)
    for row, p, part, tail in zip(rows, prompts, parts, tails, strict=True):
        single = model(row[None, : p + n])[0]
        assert_equal(torch.cat((*part, tail)), single, 1e-6 if config.rope_in_cache else 1e-12)
