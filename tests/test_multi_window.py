"""Windows that differ by head: the identities of mswa layers; tests/test_mixers.py holds them to the contract."""

import pytest
import torch
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model

from model.attention.mask import attention_mask
from model.cost import cache_bytes
from model.gpt import GPT
from scripts.masks import weights_of

T = 13


def from_parts(model: GPT, whole: GPT) -> GPT:
    """Another network with the weights of mswa layers, put together."""
    state = {name: x for name, x in model.state_dict().items() if ".mixer." not in name}
    for i, block in enumerate(model.h):
        for c in ("c_q", "c_k", "c_v", "c_proj"):
            weights = [getattr(part, c).weight for part in block.mixer.parts]
            state[f"h.{i}.mixer.{c}.weight"] = torch.cat(weights, dim=1 if c == "c_proj" else 0)
    whole.load_state_dict(state)
    return whole


@pytest.mark.parametrize("window", [1, 4, T])
@torch.no_grad()
def test_equal_windows_equal_a_sliding_layer(window):
    design, idx = {"qk_norm": False, "n_sink": 1, "n_kv_head": 6}, random_tokens(2, T)
    parts = tiny_model(tiny_config(pattern="mswa", head_windows=(window,) * 3, **design))
    whole = from_parts(parts, tiny_model(tiny_config(pattern="swa", window=window, **design), seed=7))
    assert_equal(parts(idx), whole(idx))


@torch.no_grad()
def test_each_part_of_the_heads_sees_its_own_window():
    model, found = tiny_model(tiny_config(pattern="mswa", head_windows=(2, 5), n_layer=1)), []
    for part in model.h[0].mixer.parts:
        part.register_forward_hook(lambda part, args, _: found.append(weights_of(part, args)))
    model(random_tokens(1, T))
    pos = torch.arange(T)[None]
    for window, weights in zip((2, 5), found, strict=True):
        seen = attention_mask(pos, pos, tiny_config(pattern="swa", window=window).layers[0])[0]
        assert torch.equal(weights > 0, seen.expand(3, -1, -1))


def test_a_short_window_keeps_a_short_ring():
    config = tiny_config(pattern="mswa", head_windows=(2, 5), n_layer=1, n_sink=1)
    assert cache_bytes(config, 100, dtype=torch.float32) == 2 * ((1 + 2) + (1 + 5)) * 1 * 8 * 4
    assert GPT(config).new_cache(1, 100).max_length is None


def test_a_window_for_all_heads_keeps_the_weights():
    config = tiny_config(pattern="mswa", head_windows=(2, 5))
    slid = config.sliding(4, 1)
    assert [part.window for part in slid.layers[0].parts] == [4, 4]
    GPT(slid).load_state_dict(GPT(config).state_dict())


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (
            {},
            "head_windows ([]) of mswa layers must be numbers of keys, each at least 1, as many as divide n_kv_head",
        ),
        ({"head_windows": (1, 2, 3)}, "head_windows ([1, 2, 3]) of mswa layers must be"),
        ({"head_windows": (0, 2)}, "head_windows ([0, 2]) of mswa layers must be"),
        ({"head_windows": (1, 2), "position": "alibi"}, "mswa splits the heads: it excludes position = alibi"),
        ({"head_windows": (1, 2), "qk_norm_over": "projection"}, "and qk_norm_over = projection"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(design, message):
    with pytest.raises(ValueError, match="Value error") as refused:
        tiny_config(pattern="mswa", **design)
    assert message in str(refused.value)
