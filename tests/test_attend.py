"""Who sees whom, and every kernel against loops."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attending import attend, kernel_name
from conftest import assert_equal
from torch import Tensor

from model.attention import dispatch
from model.attention.kernels import masked
from model.attention.mask import attention_mask
from model.attention.spec import AttentionSpec
from model.context import EMPTY, PADDING
from model.errors import UserError

B, H, T, D = 3, 6, 9, 4
CPU = torch.device("cpu")
WINDOWS = (None, 1, 2, T - 1, T, T + 1)
SLOPES = [2.0**-n for n in (2, 4, 6, 8, 1, 3)]  # of 6 heads: those of 4, then every second one of 8
SHAPED = [
    {"scale": 0.3},
    {"softcap": 0.7},
    {"alibi": True},
    {"sink_logit": True},
    {"scale": 0.9, "softcap": 1.5, "alibi": True, "sink_logit": True},
]


def make_spec(**overrides) -> AttentionSpec:
    return AttentionSpec(**({"n_embd": 20, "n_head": H, "n_kv_head": 2, "head_dim": D} | overrides))


def make_qkv(spec: AttentionSpec, Tq: int = T, Tk: int = T, rows: int = B) -> list[Tensor]:
    torch.manual_seed(0)
    heads = ((spec.n_head, Tq), (spec.n_kv_head, Tk), (spec.n_kv_head, Tk))
    return [torch.randn(rows, n, t, spec.head_dim, dtype=torch.float64, requires_grad=True) for n, t in heads]


def sees(q_pos: int, k_pos: int, window: int | None, n_sink: int) -> bool:
    """The definition, in words: pads see pads; else the last `window` positions up to its own, and the sinks."""
    if q_pos == PADDING:
        return k_pos == PADDING
    if k_pos < 0 or k_pos > q_pos:
        return False
    return window is None or k_pos < n_sink or q_pos - k_pos <= window - 1


def attend_by_loops(q, k, v, q_pos, k_pos, spec: AttentionSpec, sink_logit: Tensor | None = None) -> Tensor:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        queries, keys = (pos[b if len(pos) > 1 else 0].tolist() for pos in (q_pos, k_pos))
        for h in range(spec.n_head):
            kv = h * spec.n_kv_head // spec.n_head
            for i, query in enumerate(queries):
                seen = [j for j, key in enumerate(keys) if sees(query, key, spec.window, spec.n_sink)]
                scores = torch.stack([q[b, h, i] @ k[b, kv, j] for j in seen])
                scores = scores / math.sqrt(spec.head_dim) if spec.scale is None else scores * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                if spec.alibi:
                    scores = scores - SLOPES[h] * torch.tensor([query - keys[j] for j in seen])
                sink = 0 if sink_logit is None else sink_logit[h].exp()
                weights = scores.exp() / (scores.exp().sum() + sink)
                out[b, h, i] = sum(w * v[b, kv, j] for w, j in zip(weights, seen, strict=True))
    return out


def assert_same_with_gradients(ours: Callable[[], Tensor], judge: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    results = []
    for run in (ours, judge):
        y = run()
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("n_sink", [0, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_visible_matches_a_triple_loop(window, n_sink):
    q_pos = torch.tensor([[0, 1, 2, 7, 8, PADDING], [3, 4, 5, PADDING, PADDING, PADDING], [9, 10, 11, 12, 13, 14]])
    k_pos = torch.tensor([[8, 1, 7, 0, 2, EMPTY, PADDING], [5, 4, 3, 2, PADDING, EMPTY, 0], [14, 2, 1, 9, 12, 13, 3]])
    expected = torch.zeros(3, 1, 6, 7, dtype=torch.bool)
    for b in range(3):
        for i in range(6):
            for j in range(7):
                expected[b, 0, i, j] = sees(int(q_pos[b, i]), int(k_pos[b, j]), window, n_sink)
    assert torch.equal(attention_mask(q_pos, k_pos, make_spec(window=window, n_sink=n_sink)), expected)


def test_empty_slots_see_nothing_and_are_seen_by_nobody():
    pos = torch.tensor([[EMPTY, PADDING, 0, 1]])
    seen = attention_mask(pos, pos, make_spec())[0, 0]
    assert not seen[0].any()
    assert not seen[:, 0].any()


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("window", [1, 2, 5, T])
def test_query_sees_exactly_window_keys(window, contiguous):
    spec, pos = make_spec(n_head=1, n_kv_head=1, head_dim=T, window=window), torch.arange(T)[None]
    q, v = torch.zeros(1, 1, T, T), torch.eye(T)[None, None]
    weights = attend(q, q, v, pos, pos, spec, contiguous=contiguous)[0, 0]  # with zero scores, 1 / count where seen
    counts = [min(i + 1, window) for i in range(T)]
    assert (weights > 0).sum(dim=1).tolist() == counts
    assert_equal(weights.amax(dim=1), 1 / torch.tensor(counts), 1e-6)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize("n_sink", [0, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_and_gradients_match_loops(window, n_sink, n_kv_head, contiguous):
    spec = make_spec(window=window, n_sink=n_sink, n_kv_head=n_kv_head)
    qkv, pos = make_qkv(spec, rows=2), torch.arange(T)[None]
    assert_same_with_gradients(
        lambda: attend(*qkv, pos, pos, spec, contiguous=contiguous),
        lambda: attend_by_loops(*qkv, pos, pos, spec),
        qkv,
    )


@pytest.mark.parametrize("n_sink", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_rows_with_their_own_positions_match_loops(window, n_sink):
    q_pos = torch.tensor([[4, 5], [8, PADDING], [0, 1]])
    k_pos = torch.tensor([[5, 1, 2, 3, 4, 0, EMPTY], [0, 6, 7, 8, 4, 5, PADDING], [0, 1] + [EMPTY] * 5])
    spec = make_spec(window=window, n_sink=n_sink)
    qkv = make_qkv(spec, 2, 7)
    assert_same_with_gradients(
        lambda: attend(*qkv, q_pos, k_pos, spec), lambda: attend_by_loops(*qkv, q_pos, k_pos, spec), qkv
    )


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize(("window", "n_sink"), [(None, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("shape", SHAPED, ids=str)
def test_shaped_scores_and_gradients_match_loops(shape, window, n_sink, n_kv_head, contiguous):
    spec = make_spec(window=window, n_sink=n_sink, n_kv_head=n_kv_head, **shape)
    qkv, pos = make_qkv(spec, rows=2), torch.arange(T)[None]
    sink = torch.linspace(-1, 2, H).double().requires_grad_() if spec.sink_logit else None
    assert_same_with_gradients(
        lambda: attend(*qkv, pos, pos, spec, sink_logit=sink, contiguous=contiguous),
        lambda: attend_by_loops(*qkv, pos, pos, spec, sink),
        qkv if sink is None else [*qkv, sink],
    )


@pytest.mark.parametrize("shape", SHAPED, ids=str)
def test_shaped_scores_of_rows_with_their_own_positions_match_loops(shape):
    q_pos = torch.tensor([[4, 5], [8, PADDING], [0, 1]])
    k_pos = torch.tensor([[5, 1, 2, 3, 4, 0, EMPTY], [0, 6, 7, 8, 4, 5, PADDING], [0, 1] + [EMPTY] * 5])
    spec = make_spec(window=3, n_sink=1, **shape)
    qkv, sink = make_qkv(spec, 2, 7), torch.linspace(-1, 2, H).double() if spec.sink_logit else None
    expected = attend_by_loops(*qkv, q_pos, k_pos, spec, sink)
    assert_equal(attend(*qkv, q_pos, k_pos, spec, sink_logit=sink), expected)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_learned_sink_of_minus_infinity_equals_plain_attention(window, contiguous):
    spec, pos = make_spec(window=window), torch.arange(T)[None]
    qkv, never = make_qkv(spec), torch.full((H,), -torch.inf).double()
    sunk = attend(*qkv, pos, pos, make_spec(window=window, sink_logit=True), sink_logit=never, contiguous=contiguous)
    assert_equal(sunk, attend(*qkv, pos, pos, spec, contiguous=contiguous))


@pytest.mark.parametrize("limit", [1, 60, 1000])
def test_scores_exist_in_pieces_that_change_nothing(monkeypatch, limit):
    spec, pos = make_spec(window=4, n_sink=1, softcap=0.7, alibi=True), torch.arange(T).expand(B, -1)
    qkv = make_qkv(spec)
    whole = attend(*qkv, pos, pos, spec)
    monkeypatch.setattr(masked, "MASK_ELEMENTS", limit)
    assert_equal(attend(*qkv, pos, pos, spec), whole)


@pytest.mark.parametrize("shape", [{"softcap": 0.7}, {"alibi": True}, {"sink_logit": True}], ids=str)
def test_shaped_scores_take_a_kernel_that_knows_them(shape):
    spec = make_spec(window=3, **shape)
    assert kernel_name(spec, T, CPU, torch.float32) == "tiles"
    assert kernel_name(spec, T, torch.device("cuda"), torch.bfloat16) == "tiles"
    assert kernel_name(spec, T, CPU, torch.float32, contiguous=False) == "masked-scores"
    assert kernel_name(make_spec(kernel="masked", **shape), T, CPU, torch.float32) == "masked-scores"
    for kernel in ("sdpa", "amx", "flex"):
        with pytest.raises(UserError, match=rf"kernel \({kernel}\) does not support {spec.score_mods[0]}: take tiles"):
            kernel_name(make_spec(kernel=kernel, **shape), T, torch.device("cuda"), torch.bfloat16)


def test_a_row_of_positions_serves_all_rows():
    spec = make_spec(window=3)
    qkv, q_pos, k_pos = make_qkv(spec, 4), torch.arange(5, T)[None], torch.arange(T)[None]
    expected = attend(*qkv, q_pos.expand(B, -1), k_pos.expand(B, -1), spec)
    assert_equal(attend(*qkv, q_pos, k_pos, spec), expected)


def test_padded_row_is_finite_with_finite_gradients():
    spec = make_spec(window=3)
    qkv, pos = make_qkv(spec), torch.full((B, T), PADDING)
    y = attend(*qkv, pos, pos, spec)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), qkv))


@pytest.mark.parametrize("limit", [1, 60, 200, 1000])
def test_tiles_of_queries_change_nothing(monkeypatch, limit):
    spec = make_spec(window=4, n_sink=1)
    qkv, pos = make_qkv(spec), torch.arange(T).expand(B, -1)
    untiled = attend(*qkv, pos, pos, spec).detach()
    monkeypatch.setattr(masked, "MASK_ELEMENTS", limit)
    assert_same_with_gradients(lambda: attend(*qkv, pos, pos, spec), lambda: attend_by_loops(*qkv, pos, pos, spec), qkv)
    assert_equal(attend(*qkv, pos, pos, spec), untiled)


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[dict]:
    """The keyword arguments of each call of PyTorch's attention, and how many heads its keys have."""
    calls, original = [], F.scaled_dot_product_attention

    def record(q, k, v, **kwargs):
        calls.append(kwargs | {"key_heads": k.shape[1]})
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def test_masks_stay_below_their_limit(monkeypatch, sdpa_calls):
    spec, limit = make_spec(window=4), 200
    monkeypatch.setattr(masked, "MASK_ELEMENTS", limit)
    pos = torch.arange(T).expand(B, -1)
    attend(*make_qkv(spec), pos, pos, spec)
    assert len(sdpa_calls) > 1
    assert max(call["attn_mask"].numel() for call in sdpa_calls) <= limit


@pytest.mark.parametrize("n_kv_head", [6, 2])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("window", [None, 3, T])
def test_kernel_name_is_what_ran(sdpa_calls, monkeypatch, window, contiguous, n_kv_head):
    spec, pos = make_spec(window=window, n_kv_head=n_kv_head), torch.arange(T)[None]
    tiled = []
    original = dispatch.tiles
    monkeypatch.setattr(dispatch, "tiles", lambda *args: tiled.append(args) or original(*args))
    attend(*make_qkv(spec), pos, pos, spec, contiguous=contiguous)
    name = kernel_name(spec, T, CPU, torch.float64, contiguous=contiguous)
    assert bool(tiled) == (name == "tiles")
    assert bool(sdpa_calls) == (name != "tiles")
    for call in sdpa_calls:
        assert ("masked" in name) == (call.get("attn_mask") is not None)
        assert ("causal" in name) == call.get("is_causal", False)
        assert ("expanded" in name) == (call["key_heads"] > n_kv_head)


@pytest.mark.parametrize(("window", "contiguous"), [(3, True), (None, False), (T - 1, True)])
def test_causal_kernel_takes_only_whole_sequences(window, contiguous):
    assert "causal" not in kernel_name(make_spec(window=window), T, CPU, torch.float32, contiguous=contiguous)


def test_a_kernel_that_cannot_serve_is_refused_and_not_replaced():
    with pytest.raises(UserError, match=r"kernel \(sdpa\) does not support a window \(3 of 9 tokens\): take tiles"):
        kernel_name(make_spec(window=3, kernel="sdpa"), T, CPU, torch.float32)
    with pytest.raises(UserError, match=r"kernel \(flex\) needs cuda, not cpu: take tiles"):
        kernel_name(make_spec(window=3, kernel="flex"), T, CPU, torch.float32)
    needs = r"kernel \(amx\) needs a CPU with AMX, a C\+\+ compiler, bfloat16 and head_dim a multiple of 32, not"
    for dtype, here in ((torch.float32, "cpu, float32 and 4"), (torch.bfloat16, "cpu, bfloat16 and 4")):
        with pytest.raises(UserError, match=f"{needs} {here}: take tiles or auto"):
            kernel_name(make_spec(window=3, kernel="amx"), T, CPU, dtype)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("window", [T, T + 1])
def test_window_as_long_as_the_text_equals_full(window, contiguous):
    qkv, pos = make_qkv(make_spec()), torch.arange(T)[None]
    full = attend(*qkv, pos, pos, make_spec(), contiguous=contiguous)
    assert_equal(attend(*qkv, pos, pos, make_spec(window=window), contiguous=contiguous), full)


def test_window_of_one_returns_the_tokens_own_value():
    spec, pos = make_spec(window=1, n_kv_head=H), torch.arange(T)[None]
    q, k, v = make_qkv(spec)
    assert_equal(attend(q, k, v, pos, pos, spec, contiguous=True), v)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_kv_heads_are_repeated_interleaved(n_kv_head, window, contiguous):
    q, k, v = make_qkv(make_spec(n_kv_head=n_kv_head))
    pos, mha = torch.arange(T)[None], make_spec(n_kv_head=H, window=window)
    k_all, v_all = (x.repeat_interleave(H // n_kv_head, dim=1) for x in (k, v))
    expected = attend(q, k_all, v_all, pos, pos, mha, contiguous=contiguous)
    spec = make_spec(n_kv_head=n_kv_head, window=window)
    assert_equal(attend(q, k, v, pos, pos, spec, contiguous=contiguous), expected)
