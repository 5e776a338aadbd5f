"""Patterns that are no window: against loops over the definition, the cache, and their costs."""

import pytest
import torch
from attending import kernel_name
from conftest import assert_equal, cut, logits_in_chunks, random_tokens
from networks import tiny_config, tiny_model

from model.attention.mask import attention_mask
from model.attention.sparse import Sparse
from model.cost import cache_bytes, train_flops
from model.errors import UserError

T, L, W = 29, 4, 3
DESIGNS = {
    "strided": {"pattern": "strided", "sparse_block": L},
    "fixed": {"pattern": "fixed", "sparse_block": L, "n_summary": 2},
    "star": {"pattern": "star", "sparse_block": L, "star_context": 17},
    "global": {"pattern": "swa", "window": W, "global_tokens": (2, 9)},
    "random": {"pattern": "swa", "window": W, "n_random": 2, "n_sink": 1},
}
each_design = pytest.mark.parametrize("name", DESIGNS)


def sees(name: str, i: int, j: int) -> bool:
    """The definitions, in words."""
    if j > i:
        return False
    match name:
        case "strided":
            return i - j < L or (i - j) % L == 0
        case "fixed":
            return i // L == j // L or j % L >= L - 2
        case "star":
            return i // L == j // L or j // L == 0 or i >= 17
        case "global":
            return i - j < W or j in (2, 9) or i in (2, 9)
    raise AssertionError(name)


def seen_by(name: str) -> torch.Tensor:
    pos = torch.arange(T)[None]
    return attention_mask(pos, pos, tiny_config(**DESIGNS[name]).layers[0])[0, 0]


@pytest.mark.parametrize("name", ["strided", "fixed", "star", "global"])
def test_pattern_is_that_of_its_definition(name):
    expected = torch.tensor([[sees(name, i, j) for j in range(T)] for i in range(T)])
    assert torch.equal(seen_by(name), expected)


def test_random_blocks_are_whole_past_the_same_for_a_block_of_queries_and_other_ones_in_other_layers():
    config = tiny_config(**DESIGNS["random"] | {"n_layer": 2})
    pos = torch.arange(300)[None]
    masks = [attention_mask(pos, pos, spec)[0, 0] for spec in config.layers]
    assert not torch.equal(*masks)
    q, k = pos[0][:, None], pos[0][None]
    for mask in masks:
        drawn = mask & (q - k >= W) & (k > 0)  # beside the window and the sink
        blocks = drawn.unflatten(0, (-1, W)).unflatten(2, (-1, W))  # (query block, query, key block, key)
        beside = blocks.any(dim=3).any(dim=1)  # (query block, key block)
        assert (beside.sum(dim=1) <= 2 + 1).all()  # and the part of the block before that the window has left
        far = beside & (torch.arange(100)[:, None] - torch.arange(100) > 1)
        assert far.sum(dim=1)[2:].float().mean() > 1.5  # two draws are seldom the same
        whole = blocks[2:, :, 1:].all(dim=3).all(dim=1)[far[2:, 1:]]
        assert whole.all()
        assert far.sum(dim=0)[:90].gt(0).float().mean() > 0.6  # from anywhere in the past


@pytest.mark.parametrize(
    ("design", "like"),
    [
        ({"pattern": "strided", "sparse_block": 1}, {"pattern": "full"}),
        ({"pattern": "fixed", "sparse_block": L, "n_summary": L}, {"pattern": "full"}),
        ({"pattern": "fixed", "sparse_block": T, "n_summary": 1}, {"pattern": "full"}),
        ({"pattern": "star", "sparse_block": T, "star_context": T}, {"pattern": "full"}),
        ({"pattern": "star", "sparse_block": L, "star_context": 0}, {"pattern": "full"}),
        ({"pattern": "swa", "window": W, "global_tokens": tuple(range(T))}, {"pattern": "full"}),
    ],
    ids=str,
)
def test_pattern_that_hides_nothing_equals_full(design, like):
    idx = random_tokens(2, T)
    assert_equal(tiny_model(tiny_config(**design))(idx), tiny_model(tiny_config(**like))(idx))


@each_design
@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * T, [W + 1] * 9, [17, 1, 11]], ids=["ones", "W+1", "chunks"])
def test_cached_equals_uncached_and_is_causal(name, sizes):
    model, idx = tiny_model(tiny_config(**DESIGNS[name] | {"sink_logit": True})), random_tokens(2, T)
    cache = model.new_cache(2, T)
    plain = model(idx)
    assert_equal(logits_in_chunks(model, idx, sizes, cache), plain)
    assert_equal(model(idx[:, :13]), plain[:, :13])
    assert cache.nbytes == cache_bytes(model.config, T, batch_size=2, dtype=torch.float64)


@torch.no_grad()
def test_star_is_what_its_two_phases_compute():
    config = tiny_config(**DESIGNS["star"])
    model, idx, context = tiny_model(config), random_tokens(1, T), 17
    full = tiny_model(tiny_config(pattern="full"))
    anchor = full(idx[:, :L])
    one_pass = model(idx)
    assert_equal(one_pass[:, :L], anchor)  # phase 1, block 0: by itself
    for start in range(L, context, L):  # the others beside the anchor, at the positions that they have
        other = idx.clone()
        other[:, L:start] = (other[:, L:start] + 1) % 31
        stop = min(start + L, context)
        assert_equal(model(other)[:, start:stop], one_pass[:, start:stop])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[29], [1] * 29, [13, 1, 9]], ids=["one shot", "ones", "chunks"])
def test_each_text_has_a_context_of_its_own_which_its_cache_remembers(sizes):
    model = tiny_model(tiny_config(**DESIGNS["star"] | {"star_context": 5, "attn_softcap": 2.0}))
    idx, context = random_tokens(2, T), torch.tensor([9, 17])
    expected = torch.cat(
        [
            tiny_model(tiny_config(**DESIGNS["star"] | {"star_context": n, "attn_softcap": 2.0}))(row[None])
            for n, row in zip((9, 17), idx, strict=True)
        ]
    )
    assert_equal(model(idx, star_context=context), expected)
    assert_equal(model(idx[1:], star_context=17), expected[1:])
    cache = model.new_cache(2, T)
    first, *rest = idx.split(cut(sizes, T), dim=1)
    logits = [model(first, cache=cache, star_context=context), *(model(part, cache=cache) for part in rest)]
    assert_equal(torch.cat(logits, dim=1), expected)
    tail = cache.fork(2)
    assert tail.star_context.tolist() == [9, 9, 17, 17]
    cache.reset()
    assert_equal(logits_in_chunks(model, idx, sizes, cache), model(idx))  # 5, as the config says


@each_design
def test_costs_count_the_pairs_that_are_visible(name):
    config, full = tiny_config(**DESIGNS[name]), tiny_config(pattern="full")
    assert config.layers[0].n_pairs(T) == seen_by(name).sum()
    hidden = sum(T * (T + 1) // 2 - spec.n_pairs(T) for spec in config.layers)
    assert train_flops(full, T) - train_flops(config, T) == 3 * 4 * 6 * 8 * hidden > 0


@each_design
def test_no_kernel_but_the_mask_takes_a_pattern(name):
    spec, device = tiny_config(**DESIGNS[name]).layers[0], torch.device("cpu")
    assert kernel_name(spec, T, device, torch.float32) == "masked"
    for kernel in ("sdpa", "tiles", "amx", "flex"):
        spec = tiny_config(**DESIGNS[name], kernel=kernel).layers[0]
        with pytest.raises(UserError, match=rf"kernel \({kernel}\) does not support \w+ patterns: take masked or auto"):
            kernel_name(spec, T, device, torch.float32)


def test_a_pass_that_has_no_room_leaves_the_cache_as_it_was():
    model, idx = tiny_model(tiny_config(**DESIGNS["star"])), random_tokens(2, 17)
    cache = model.new_cache(2, 17)
    model(idx[:, :9], cache=cache, star_context=2)
    with pytest.raises(UserError, match="the cache"):
        model(idx[:, :9], cache=cache, star_context=17)
    assert_equal(model(idx[:, 9:], cache=cache), model(idx, star_context=2)[:, 9:])


def test_a_window_for_all_takes_the_place_of_a_pattern():
    slid = tiny_config(**DESIGNS["strided"]).sliding(5, 1)
    assert [(spec.kind, spec.window, spec.n_sink, spec.sparse) for spec in slid.layers] == [("swa", 5, 1, None)] * 2


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"pattern": "strided"}, "pattern ('strided') has strided layers: give sparse_block"),
        ({"pattern": "fixed", "sparse_block": 4}, "pattern ('fixed') has fixed layers: give n_summary"),
        ({"pattern": "fixed", "sparse_block": 4, "n_summary": 5}, "n_summary (5) must be at most sparse_block (4)"),
        ({"pattern": "star", "sparse_block": 4}, "pattern ('star') has star layers: give star_context"),
        ({"global_tokens": (1,)}, "global_tokens and n_random need swa layers, and pattern ('full') has none"),
        ({"pattern": "swa", "window": 2, "global_tokens": (-1,)}, "global_tokens ([-1]) are positions: from 0 on"),
    ],
    ids=str,
)
def test_what_a_pattern_lacks_is_said(design, message):
    with pytest.raises(ValueError, match="Value error") as refused:
        tiny_config(**design)
    assert message in str(refused.value)


def test_patterns_are_numbers():
    assert tiny_config(**DESIGNS["fixed"]).layers[0].sparse == Sparse(rule="fixed", block=L, n_summary=2)
