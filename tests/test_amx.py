"""The C++ of model/cpp against the masked form of attention, on processors that have AMX."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from attending import attend, kernel_name
from conftest import needs_amx
from torch import Tensor

import model.cpu.cpp_ops
from model.attention.spec import AttentionSpec
from model.cpu.amx import amx, serves, work_bytes
from model.cpu.cpp_build import BuildError
from model.memory import measure_peak

CPU, B = torch.device("cpu"), 2
LIMIT = 0.01  # of the norm; rounding alone makes 0.002 to 0.004
OF_ROW = 0.03  # of what a query gets: of 127 values one more or less makes 0.09


def make_qkv(T: int, heads: int = 4, kv_heads: int = 2, width: int = 64, rows: int = B) -> tuple[list[Tensor], Tensor]:
    """As a fused projection leaves them: time before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, T, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, grad = (torch.randn(s, generator=generator).bfloat16().transpose(1, 2) for s in shapes)
    return [x.requires_grad_() for x in qkv], grad


def outputs(inputs: list[Tensor], grad: Tensor, *numbers) -> list[Tensor]:
    y = amx(*inputs, *numbers)[0]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def judged(inputs: list[Tensor], grad: Tensor, window: int, n_sink: int, scale: float | None = None) -> list[Tensor]:
    """The masked form in float64, of queries at the last keys."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    heads = {"n_head": q.shape[1], "n_kv_head": k.shape[1], "head_dim": q.shape[3], "scale": scale}
    spec = AttentionSpec(n_embd=8, window=window, n_sink=n_sink, kernel="masked", **heads)
    pos = torch.arange(k.shape[2])[None]
    y = attend(q, k, v, pos[:, -q.shape[2] :], pos, spec)
    return [y.detach(), *torch.autograd.grad(y, [q, k, v], grad.double())]


def assert_near(ours: list[Tensor], expected: list[Tensor]) -> None:
    """With a window of one key the gradients of queries and keys are nothing but what was rounded."""
    for actual, exact in zip(ours, expected, strict=True):
        assert (actual.double() - exact).norm() <= LIMIT * exact.norm() + 1e-6 * expected[0].norm()
    assert ((ours[0].double() - expected[0]).norm(dim=-1) <= OF_ROW * expected[0].norm(dim=-1)).all()


@needs_amx
@pytest.mark.parametrize("T", [1, 31, 64, 65, 200, 257])
@pytest.mark.parametrize("n_sink", [0, 4, 70])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 127, 128, 199, 200, 201])
def test_it_equals_the_masked_form(window, n_sink, T):
    inputs, grad = make_qkv(T)
    assert_near(outputs(inputs, grad, window, n_sink), judged(inputs, grad, window, n_sink))


@needs_amx
@pytest.mark.parametrize("width", [32, 64, 96, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads_of_any_number_and_width(heads, kv_heads, width):
    inputs, grad = make_qkv(150, heads, kv_heads, width)
    assert_near(outputs(inputs, grad, 70, 3, 0.2), judged(inputs, grad, 70, 3, 0.2))


@needs_amx
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_threads_share_the_work_and_change_nothing_but_rounding(kv_heads, n_threads):
    """One text with one KV head too: parts of its query heads, whose gradients of keys are added up."""
    inputs, grad = make_qkv(700, 6, kv_heads, rows=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        ours = outputs(inputs, grad, 100, 70)
    finally:
        torch.set_num_threads(threads)
    assert_near(ours, judged(inputs, grad, 100, 70))


@needs_amx
@pytest.mark.parametrize("n", [1, 33, 46, 64, 100, 299])
@pytest.mark.parametrize(("window", "n_sink"), [(1, 0), (50, 0), (50, 4), (150, 70), (300, 0)])
def test_queries_of_a_chunk_stand_at_the_last_keys(window, n_sink, n):
    (q, k, v), grad = make_qkv(300)
    inputs = [q.detach()[:, :, -n:].requires_grad_(), k, v]
    assert_near(outputs(inputs, grad[:, :, -n:], window, n_sink), judged(inputs, grad[:, :, -n:], window, n_sink))


@needs_amx
def test_a_batch_row_is_what_it_is_alone():
    inputs, grad = make_qkv(130)
    whole = outputs(inputs, grad, 40, 2)
    for b in range(B):
        row = [x.detach()[b : b + 1].requires_grad_() for x in inputs]
        for alone, together in zip(outputs(row, grad[b : b + 1], 40, 2), whole, strict=True):
            assert torch.equal(alone[0], together[b])


@needs_amx
def test_any_layout_serves():
    inputs, grad = make_qkv(90)
    expected = outputs(inputs, grad, 40, 2)
    heads_first = [x.detach().contiguous().requires_grad_() for x in inputs]
    wide = [torch.cat([x.detach(), x.detach()], dim=-1)[..., :64].requires_grad_() for x in inputs]
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    for others in (heads_first, wide, turned):
        for grads in (grad, grad.mT.contiguous().mT):
            for actual, same in zip(outputs(others, grads, 40, 2), expected, strict=True):
                assert torch.equal(actual, same)
            assert amx(*others, 40, 2)[0].transpose(1, 2).is_contiguous()  # as what comes after it keeps it
    y = amx(*inputs, 40, 2)[0]
    ones = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for actual, same in zip(torch.autograd.grad(amx(*inputs, 40, 2)[0].sum(), inputs), ones, strict=True):
        assert torch.equal(actual, same)


@needs_amx
def test_scores_of_any_size_have_a_softmax():
    (q, k, v), grad = make_qkv(100)
    inputs = [(x.detach() * factor).requires_grad_() for x, factor in ((q, 300), (k, 300), (v, 1))]
    assert_near(outputs(inputs, grad, 30, 2)[:1], judged(inputs, grad, 30, 2)[:1])
    assert all(x.isfinite().all() for x in outputs(inputs, grad, 30, 2))


@needs_amx
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_one_operator_that_compilers_understand(turned):
    inputs, _ = make_qkv(70, width=32)
    inputs = [x.detach().mT.contiguous().mT.requires_grad_() if turned else x for x in inputs]
    torch.library.opcheck(torch.ops.sash.amx.default, (*inputs, 20, 3, None))
    kinds = [(x.shape, x.stride()) for x in outputs(inputs, torch.ones_like(inputs[0]), 20, 3)]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x.detach()).requires_grad_() for x in inputs]
        found = outputs(fakes, torch.ones_like(fakes[0]), 20, 3)
    assert [(x.shape, x.stride()) for x in found] == kinds


@needs_amx
@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize(
    ("kv_heads", "n", "window", "n_sink"), [(4, 1024, 256, 4), (4, 1024, 1024, 0), (1, 1024, 100, 0), (2, 100, 1024, 9)]
)
def test_it_holds_what_it_is_said_to(kv_heads, n, window, n_sink, n_threads):
    (q, k, v), grad = make_qkv(1024, 4, kv_heads, rows=1)
    q, k, v, grad = (x.detach() for x in (q[:, :, -n:], k, v, grad[:, :, -n:]))
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with measure_peak(CPU) as forward:
            out, lse = amx(q, k, v, window, n_sink)
        with measure_peak(CPU) as backward:
            grads = torch.ops.sash.amx_backward(grad, out, lse, q, k, v, window, n_sink, None)
        said = [work_bytes(q, k, v, window, n_sink, backward=way) for way in (False, True)]
    finally:
        torch.set_num_threads(threads)
    assert forward.bytes == said[0] + out.nbytes + lse.nbytes
    assert backward.bytes == said[1] + sum(x.nbytes for x in grads)


@needs_amx
def test_memory_of_a_window_does_not_grow_with_the_text():
    (short, long), window = (make_qkv(T)[0] for T in (500, 2000)), 100
    for backward in (False, True):
        assert len({work_bytes(q, k, v, window, 0, backward=backward) for q, k, v in (short, long)}) == 1


@needs_amx
def test_a_config_may_ask_for_it():
    spec = AttentionSpec(n_embd=8, n_head=2, n_kv_head=2, head_dim=32, window=3, kernel="amx")
    assert kernel_name(spec, 9, CPU, torch.bfloat16) == "amx"


def test_what_cannot_be_compiled_is_said_once_and_tiles_take_its_place(monkeypatch, capsys):
    def library(_):
        raise BuildError("no C++ compiler here")

    monkeypatch.setattr(model.cpu.cpp_ops, "has_amx", lambda: True)
    monkeypatch.setattr(model.cpu.cpp_ops, "library", library)
    monkeypatch.setattr(model.cpu.cpp_ops, "_loaded", {})
    assert not serves(64, CPU, torch.bfloat16)
    spec = AttentionSpec(n_embd=8, n_head=2, n_kv_head=2, head_dim=32, window=30)
    assert kernel_name(spec, 90, CPU, torch.bfloat16) == "tiles"
    said = "note: no C++ for attention, gradients and the loss, which are slower without it: no C++ compiler here\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("has", "granted"), [(True, True), (True, False), (False, True)])
def test_it_serves_where_the_processor_has_it_and_the_system_grants_it(monkeypatch, has, granted):
    names = ("call_bytes", "forward_bytes", "backward_bytes", "transpose", "loss_and_grad")
    functions = {name: Mock() for name in names}
    library = SimpleNamespace(**functions, ask=Mock(return_value=0 if granted else -1))
    monkeypatch.setattr(model.cpu.cpp_ops, "has_amx", lambda: has)
    monkeypatch.setattr(model.cpu.cpp_ops, "library", lambda _: library)
    monkeypatch.setattr(model.cpu.cpp_ops, "_loaded", {})
    assert serves(64, CPU, torch.bfloat16) == (has and granted)
    for head_dim, device, dtype in (
        (48, "cpu", torch.bfloat16),
        (64, "cuda", torch.bfloat16),
        (64, "cpu", torch.float32),
    ):
        assert not serves(head_dim, torch.device(device), dtype)


@needs_amx
def test_compiled_layers_call_it_in_one_piece():
    inputs, grad = make_qkv(90, 2, 1, 32)
    spec, pos = AttentionSpec(n_embd=8, n_head=2, n_kv_head=1, head_dim=32, window=30), torch.arange(90)[None]
    y = torch.compile(attend, fullgraph=True, backend="eager")(*inputs, pos, pos, spec, contiguous=True)
    for actual, same in zip([y, *torch.autograd.grad(y, inputs, grad)], outputs(inputs, grad, 30, 0), strict=True):
        assert torch.equal(actual, same)
