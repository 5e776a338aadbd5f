"""The attention that the first tokens get is the probability that the softmax gives them, by whatever kernel runs."""

import pytest
import torch
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model

from inference.attention_mass import attention_mass
from model.attention import dispatch
from model.attention.mask import attention_mask

T = 13


def probabilities_seen(monkeypatch, network, idx) -> list[torch.Tensor]:
    """The (B, H, T, T) probabilities of each layer, by softmax over all scores."""
    found = []

    attend = dispatch.attend

    def slow(q, k, v, k_pos, spec, ctx, **options):
        keys = k.repeat_interleave(spec.n_head // spec.n_kv_head, dim=1)
        scores = q @ keys.transpose(-1, -2) / spec.head_dim**0.5
        found.append(scores.masked_fill(~attention_mask(ctx.pos, k_pos, spec), -torch.inf).softmax(-1))
        return attend(q, k, v, k_pos, spec, ctx, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "attend", slow)
        network(idx)
    return found


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kernel", ["auto", "masked"])
def test_it_is_what_the_softmax_gives_the_first_tokens(monkeypatch, k, kernel):
    network = tiny_model(tiny_config(n_layer=3, pattern="swa full", window=7, n_sink=2, kernel=kernel))
    idx = random_tokens(2, T)
    expected = [p[:, :, k:, :k].sum(-1).mean().item() for p in probabilities_seen(monkeypatch, network, idx)]
    found = attention_mass(network, [idx], k)
    assert list(found) == [0, 1, 2]
    assert list(found.values()) == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 0.01


def test_batches_count_by_their_rows():
    network, idx = tiny_model(tiny_config()), random_tokens(3, T)
    together, apart = attention_mass(network, [idx], 2), attention_mass(network, [idx[:1], idx[1:]], 2)
    assert together == pytest.approx(apart, rel=1e-6)


def test_equal_attention_gives_each_key_its_share():
    network = tiny_model(tiny_config(qk_norm=False))
    for block in network.h:
        torch.nn.init.zeros_(block.mixer.c_q.weight)
    found = attention_mass(network, [random_tokens(2, T)], 3)
    share = sum(3 / seen for seen in range(4, T + 1)) / (T - 3)
    assert list(found.values()) == pytest.approx([share, share], rel=1e-6)


def test_looking_changes_nothing():
    network, idx = tiny_model(tiny_config()), random_tokens(2, T)
    with torch.no_grad():
        before = network(idx)
        attention_mass(network, [idx], 1)
        assert_equal(network(idx), before, 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
