"""Kernels against the masked form of attention, which tests/test_attend.py holds equal to loops."""

from collections.abc import Callable

import pytest
import torch
from attending import attend, kernel_name
from conftest import assert_equal
from torch import Tensor

import model.attention.kernels.tiles
from model import cpu
from model.attention.kernels.flex import block_mask
from model.attention.kernels.tiles import block_size, tiles, work_bytes
from model.attention.mask import attention_mask
from model.attention.rope import alibi_slopes
from model.attention.spec import AttentionSpec
from model.memory import measure_peak

B, H, K, D = 2, 6, 2, 4
CUDA = pytest.mark.gpu
SHAPED = {"softcap": 1.5, "alibi": True}


def make_spec(**overrides) -> AttentionSpec:
    return AttentionSpec(**({"n_embd": 20, "n_head": H, "n_kv_head": K, "head_dim": D} | overrides))


def make_qkv(T: int, *, heads: int = H, kv_heads: int = K, width: int = D, dtype=torch.float64, device="cpu"):
    """As a fused projection leaves them: time before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in qkv], grad.transpose(1, 2)


def outputs(y: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def judged(inputs: list[Tensor], grad: Tensor, spec: AttentionSpec) -> list[Tensor]:
    """The masked form in float64."""
    pos = torch.arange(inputs[0].shape[2])[None]
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    return outputs(attend(*wide, pos, pos, spec), wide, grad.cpu().double())


@pytest.fixture(params=[False, True], ids=["no AMX", "AMX"])
def amx(request, monkeypatch) -> bool:
    half = (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(cpu, "attention_serves", lambda d, dv, *here: request.param and here == half)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 16, 200])
@pytest.mark.parametrize("n_sink", [0, 3, 40])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 52, 53, 54])
def test_tiles_equal_the_masked_form(window, n_sink, block, dtype):
    inputs, grad = make_qkv(53, dtype=dtype)
    ours = outputs(tiles(*inputs, window, n_sink, block), inputs, grad)
    for actual, expected in zip(ours, judged(inputs, grad, make_spec(window=window, n_sink=n_sink)), strict=True):
        if dtype == torch.float64:
            assert_equal(actual, expected)
        else:
            assert (actual.double() - expected).norm() <= 0.02 * expected.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "window", "n_sink"),
    [
        (shape, *seen)
        for shape in ({}, SHAPED, SHAPED | {"sink_logit": True})
        for seen in ((None, 0), (1 if shape else 2, 0), (9, 3), (40, 0), (40, 2), (99, 4))  # of one score all is 0
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [2, 17, 33])
def test_tiles_of_a_chunk_over_a_cache_equal_the_masked_form(dtype, window, n_sink, shape, n):
    """Of the keys between the sinks and the window of the chunk's first query the cache has forgotten some."""
    T, near, learned = 70, 1e-12 if dtype == torch.float64 else 0.05, "sink_logit" in shape
    shape = shape | {"alibi": n_sink == 0 and "alibi" in shape}
    (q, k, v), grad = make_qkv(T, dtype=dtype)
    first = T - n
    low = 0 if window is None else max(0, first - window)
    pos = torch.tensor([*range(min(n_sink, low)), *range(low, T)])[None]
    inputs = [x.detach().requires_grad_() for x in (q[:, :, first:], k[:, :, pos[0]], v[:, :, pos[0]])]
    inputs += [torch.linspace(-1, 2, H).to(dtype).requires_grad_()] if learned else []
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for (q, k, v, *sink), kernel in ((inputs, "tiles"), (wide, "masked")):
        spec = make_spec(window=window, n_sink=n_sink, kernel=kernel, **shape)
        name = kernel_name(spec, n, q.device, q.dtype, contiguous=False, in_order=True)
        assert name == (kernel if kernel == "tiles" else kernel + "-scores" * bool(spec.score_mods))
        y = attend(q, k, v, pos[:, -n:], pos, spec, sink_logit=sink[0] if learned else None, in_order=True)
        results.append(outputs(y, [q, k, v, *sink], grad[:, :, first:].to(q.dtype)))
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected).norm() <= near * expected.norm() + 1e-6 * near


def test_the_last_tile_of_another_length_has_a_mask_of_its_own():
    """Of 32 queries after tiles of 33: as many keys as the tile before it."""
    inputs, grad = make_qkv(131, dtype=torch.bfloat16)
    ours = outputs(tiles(*inputs, 30, 0, 33), inputs, grad)
    for actual, expected in zip(ours, judged(inputs, grad, make_spec(window=30)), strict=True):
        assert (actual.double() - expected).norm() <= 0.02 * expected.norm()


def test_a_chunk_over_a_cache_goes_in_tiles_where_they_are_faster(amx):
    name = lambda n, dtype, spec, device="cpu": kernel_name(
        spec, n, torch.device(device), dtype, contiguous=False, in_order=True
    )
    full, sliding, far = make_spec(), make_spec(window=9), make_spec(alibi=True, window=9, n_sink=1)
    assert [name(n, torch.bfloat16, full) for n in (2, 31, 32)] == ["masked", "masked", "amx" if amx else "tiles"]
    assert (
        name(32, torch.bfloat16, make_spec(kernel="tiles"))
        == name(32, torch.bfloat16, make_spec(alibi=True))
        == "tiles"
    )
    assert [name(n, torch.float32, sliding) for n in (127, 128)] == ["masked", "tiles"]
    assert name(512, torch.float32, full) == "masked"
    assert name(512, torch.bfloat16, sliding, "cuda") == "masked"
    assert name(512, torch.bfloat16, far) == "masked-scores"  # a sink's distance is not that of its place


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("limit", [1, 3000])
def test_tiles_in_parts_equal_the_masked_form(monkeypatch, kv_heads, limit):
    monkeypatch.setattr(model.attention.kernels.tiles, "TILE_BYTES", limit)
    inputs, grad = make_qkv(29, kv_heads=kv_heads)
    spec = make_spec(window=5, n_sink=2, n_kv_head=kv_heads)
    for actual, expected in zip(
        outputs(tiles(*inputs, 5, 2, 8), inputs, grad), judged(inputs, grad, spec), strict=True
    ):
        assert_equal(actual, expected)


@pytest.mark.parametrize("T", [1, 40, 129])
@pytest.mark.parametrize("window", [1, 2, 63, 64, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chosen_kernel_equals_the_masked_form(dtype, window, T):
    spec = make_spec(window=window, n_sink=0 if window is None else 4)
    inputs, grad = make_qkv(T, dtype=dtype)
    pos = torch.arange(T)[None]
    ours = outputs(attend(*inputs, pos, pos, spec, contiguous=True), inputs, grad)
    for actual, expected in zip(ours, judged(inputs, grad, spec), strict=True):
        if dtype == torch.float64:
            assert_equal(actual, expected)
        else:
            assert (actual.double() - expected).norm() <= 0.02 * expected.norm() + 1e-6


@pytest.mark.parametrize("limit", [1, 3000, 1 << 22])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize(("window", "n_sink"), [(5, 2), (29, 0)])
def test_tiles_of_shaped_scores_equal_the_masked_form(monkeypatch, window, n_sink, kv_heads, limit):
    monkeypatch.setattr(model.attention.kernels.tiles, "TILE_BYTES", limit)
    qkv, grad = make_qkv(29, kv_heads=kv_heads)
    shape = {"scale": 0.8, "softcap": 1.5, "alibi": True, "sink_logit": True}
    spec, pos = make_spec(window=window, n_sink=n_sink, n_kv_head=kv_heads, **shape), torch.arange(29)[None]
    inputs = [*qkv, torch.linspace(-1, 2, H).double().requires_grad_()]
    slopes = alibi_slopes(H, torch.device("cpu"), torch.float64)
    ours = outputs(tiles(*qkv, window, n_sink, 8, 0.8, 1.5, slopes, inputs[3]), inputs, grad)
    masked = outputs(attend(*qkv, pos, pos, spec, sink_logit=inputs[3]), inputs, grad)
    for actual, expected in zip(ours, masked, strict=True):
        assert_equal(actual, expected)


def test_bfloat16_tiles_of_shaped_scores_are_near_the_masked_form():
    T, shape = 700, {"softcap": 5.0, "alibi": True, "sink_logit": True}
    qkv, grad = make_qkv(T, dtype=torch.bfloat16)
    spec, pos = make_spec(window=300, n_sink=4, **shape), torch.arange(T)[None]
    inputs = [*qkv, torch.linspace(-1, 2, H).requires_grad_()]
    ours = outputs(attend(*qkv, pos, pos, spec, sink_logit=inputs[3], contiguous=True), inputs, grad)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    masked = outputs(attend(*wide[:3], pos, pos, spec, sink_logit=wide[3]), wide, grad.double())
    for actual, expected in zip(ours, masked, strict=True):
        assert (actual.double() - expected).norm() <= 0.02 * expected.norm()


def test_tiles_keep_batch_rows_apart():
    inputs, grad = make_qkv(31)
    whole = outputs(tiles(*inputs, 6, 2, 8), inputs, grad)
    rows = [[x[b : b + 1].detach().requires_grad_() for x in inputs] for b in range(B)]
    for b, row in enumerate(rows):
        for alone, together in zip(outputs(tiles(*row, 6, 2, 8), row, grad[b : b + 1]), whole, strict=True):
            assert_equal(alone[0], together[b], tolerance=1e-14)


def test_tiles_are_one_operator_that_compilers_understand():
    inputs, _ = make_qkv(20)
    torch.library.opcheck(torch.ops.sash.tiles.default, (*inputs, 6, 2, 8))
    slopes, sink = torch.rand(H).double(), torch.rand(H).double().requires_grad_()
    torch.library.opcheck(torch.ops.sash.tiles.default, (*inputs, 6, 2, 8, 0.3, 2.0, slopes, sink))


def test_tiles_memory_grows_with_the_text_and_not_with_its_square():
    def peak(T: int) -> int:
        inputs, grad = make_qkv(T, width=16, dtype=torch.float32)
        with measure_peak(torch.device("cpu")) as found:
            outputs(tiles(*inputs, 32, 4, 64), inputs, grad)
        assert found.bytes is not None
        return found.bytes

    assert peak(4096) < 2.2 * peak(2048)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "T", "n", "window", "n_sink", "block"),
    [
        (1, 8, 8, 2048, 2048, 256, 0, 96),
        (1, 8, 2, 2048, 2048, 256, 4, 96),
        pytest.param(1, 12, 12, 4096, 4096, 512, 0, 128, marks=pytest.mark.slow),
        (2, 12, 12, 1024, 1024, 1024, 0, 256),
        (2, 12, 4, 1024, 1024, 1024, 0, 256),
        pytest.param(1, 12, 2, 4096, 4096, 1024, 4, 256, marks=pytest.mark.slow),
        (1, 4, 4, 4000, 256, 4000, 4, 64),
    ],
)
def test_a_forward_holds_what_it_is_said_to(rows, heads, kv_heads, T, n, window, n_sink, block):
    q, k, v = (torch.randn(rows, t, h, 64).bfloat16().transpose(1, 2) for t, h in ((n, heads), *[(T, kv_heads)] * 2))
    numbers = (window, n_sink, block, None, None, None, None)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with measure_peak(torch.device("cpu")) as found:
            out = tiles(q, k, v, *numbers)
        said = work_bytes(q, k, v, *numbers, backward=False)
    finally:
        torch.set_num_threads(threads)
    assert found.bytes is not None
    assert said == pytest.approx(found.bytes - out.nbytes, rel=0.2)  # oneDNN takes some for itself


@pytest.mark.parametrize("T", [2048, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_of_one_text_holds_no_more_than_fused_full_attention(dtype, T):
    heads, threads = 8, torch.get_num_threads()
    inputs, grad = make_qkv(T, heads=heads, kv_heads=heads, width=64, dtype=dtype)
    inputs, grad = [x[:1].detach().requires_grad_() for x in inputs], grad[:1]
    spec, pos = make_spec(window=256, n_head=heads, n_kv_head=heads, head_dim=64), torch.arange(T)[None]

    def peak(forward: Callable[[], Tensor]) -> int:
        with measure_peak(torch.device("cpu")) as found:
            outputs(forward(), inputs, grad)
        assert found.bytes is not None
        return found.bytes

    torch.set_num_threads(2)  # of which each has memory of its own in the fused kernel
    try:
        full = peak(lambda: torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True))
        window = peak(lambda: attend(*inputs, pos, pos, spec, contiguous=True))
    finally:
        torch.set_num_threads(threads)
    assert window <= full


@pytest.mark.parametrize("vectors", [False, True])
def test_blocks_of_half_types_are_wider_where_fused_attention_holds_more(monkeypatch, vectors):
    monkeypatch.setattr(cpu, "has_avx512_bf16", lambda: vectors)
    sizes = {window: block_size(window, torch.bfloat16) for window in (1, 256, 512, 9999)}
    assert sizes == {1: 96 if vectors else 64, 256: 96 if vectors else 64, 512: 128, 9999: 256}
    assert block_size(9999, torch.float32) == 64


def test_on_a_cpu_bfloat16_takes_tiles_and_float32_the_fused_kernel(amx):
    name = lambda T, dtype, **spec: kernel_name(make_spec(**spec), T, torch.device("cpu"), dtype)
    tiled = "amx" if amx else "tiles"
    assert [name(T, torch.bfloat16) for T in (31, 128)] == ["sdpa-causal-expanded", tiled]
    assert [name(T, torch.bfloat16) for T in (32, 127)] == ["amx" if amx else "sdpa-causal-expanded"] * 2
    assert name(512, torch.float32) == "sdpa-causal-expanded"
    assert [name(T, torch.bfloat16, window=5) for T in (9, 32)] == ["tiles", tiled]
    assert name(40, torch.bfloat16, window=5, softcap=2.0) == name(40, torch.float32, window=5) == "tiles"
    assert [name(40, torch.bfloat16, window=5, kernel=kernel) for kernel in ("tiles", "masked")] == ["tiles", "masked"]


@pytest.mark.parametrize(("window", "n_sink"), [(None, 0), (40, 0), (40, 5)])
def test_flex_mask_is_visible(window, n_sink):
    T = 300
    pos = torch.arange(T)
    mask = block_mask(T, window, n_sink, torch.device("cpu"))
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), pos[:, None], pos[None])
    assert torch.equal(seen, attention_mask(pos[None], pos[None], make_spec(window=window, n_sink=n_sink))[0, 0])


@CUDA
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "flex", "tiles"])
@pytest.mark.parametrize(("window", "n_sink"), [(1, 0), (64, 0), (64, 4), (255, 4), (299, 0), (300, 0)])
def test_cuda_kernels_equal_the_masked_form(window, n_sink, kernel, compiled):
    T = 300
    spec = make_spec(window=window, n_sink=n_sink, head_dim=64, kernel=kernel)
    inputs, grad = make_qkv(T, width=64, dtype=torch.bfloat16, device="cuda")
    pos = torch.arange(T, device="cuda")[None]
    shared = {("block_mask", window, n_sink): block_mask(T, window, n_sink, torch.device("cuda"))}
    run = torch.compile(attend) if compiled else attend
    ours = outputs(run(*inputs, pos, pos, spec, contiguous=True, shared=shared), inputs, grad)
    for actual, expected in zip(ours, judged(inputs, grad, spec), strict=True):
        assert (actual.cpu().double() - expected).norm() <= 0.02 * expected.norm()


@CUDA
def test_masked_attention_with_fewer_kv_heads_stays_below_its_mask_on_cuda():
    T, spec = 4096, make_spec(window=512, head_dim=64)
    inputs, _ = make_qkv(T, width=64, dtype=torch.bfloat16, device="cuda")
    pos = torch.arange(T, device="cuda")[None]
    with torch.no_grad(), measure_peak(torch.device("cuda")) as found:
        attend(*inputs, pos, pos, spec)
    assert found.bytes is not None
    assert found.bytes - sum(x.nbytes for x in inputs) < B * H * T * T  # an unfused kernel holds that many scores
