"""Products in ways of our own: equal to nn.Linear, in a network too, and taken only where they were measured faster."""

from collections import Counter

import pytest
import torch
from conftest import assert_equal, needs_amx, random_tokens
from functorch.compile import make_boxed_func
from networks import SMALL, tiny_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.cpu import matmul as products
from model.cpu.cpp_ops import cpp_ops
from model.cpu.matmul import grad_input, grad_weight, matmul_nt
from model.layers import Linear

NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
WIDE = {torch.bfloat16: (1024, 512, 256), torch.float32: (64, 1024, 512)}  # the least rows, inputs, outputs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


WAYS = {
    "convolution": ("convolves", torch.float32),
    "half": ("convolves", torch.bfloat16),
    "copy": ("cpp_ops", torch.bfloat16),
}
OFF = {"convolves": lambda: False, "cpp_ops": lambda: None}


@pytest.fixture(params=[pytest.param(way, marks=needs_amx) if way == "copy" else way for way in WAYS])
def dtype(request, monkeypatch, threads) -> torch.dtype:
    """What is multiplied in each of the ways, however small the product, whatever the machine."""
    for sizes in ("LEAST", "LEAST_OF_WEIGHTS"):
        monkeypatch.setattr(products, sizes, dict.fromkeys(NEAR, (1, 1)))
    monkeypatch.setattr(products, "LEAST_COPIED", (1, 1))
    monkeypatch.setattr(products, "FEW_ROWS", 3)
    way, dtype = WAYS[request.param]
    monkeypatch.setattr(products, "convolves", lambda: way == "convolves")
    if way != "cpp_ops":
        monkeypatch.setattr(products, "cpp_ops", OFF["cpp_ops"])
    return dtype


@pytest.fixture
def here(monkeypatch, threads):
    """As large as ever, on a machine like those that were measured."""
    monkeypatch.setattr(products, "convolves", lambda: True)
    monkeypatch.setattr(products, "cpp_ops", OFF["cpp_ops"])


def is_ours(y: torch.Tensor) -> bool:
    steps, seen = [y.grad_fn], []
    while steps:
        step = steps.pop()
        if step is not None:
            seen.append(step.name())
            steps += [before for before, _ in step.next_functions]
    return "_LinearBackward" in seen


def outputs_and_gradients(linear: nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = linear(x)
    y.backward(grad)
    return [y, x.grad, *(p.grad for p in linear.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 1), 1), ((6,), 4), ((7, 5), 3), ((2, 9, 16), 32), ((3, 1, 33), 65)]
)
def test_products_equal_nn_linear(dtype, bias, shape, outputs):
    linear = Linear(shape[-1], outputs, bias=bias, dtype=dtype)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], outputs, dtype=dtype)
    assert is_ours(linear(x))
    found = outputs_and_gradients(linear, x, grad)
    linear.zero_grad()
    linear.__class__ = nn.Linear
    for ours, expected in zip(found, outputs_and_gradients(linear, x, grad), strict=True):
        assert ours.shape == expected.shape
        assert ours.dtype == dtype
        assert_equal(ours.float(), expected.float(), NEAR[dtype])


def test_rows_and_gradients_in_any_order_of_memory(dtype):
    linear = Linear(12, 20, dtype=dtype)
    x = torch.randn(12, 6, dtype=dtype).T
    grads = [torch.randn(20, 6, dtype=dtype).T, torch.ones(1, 1, dtype=dtype).expand(6, 20)]
    for grad in grads:
        linear.zero_grad()
        found = outputs_and_gradients(linear, x, grad)
        linear.zero_grad()
        expected = outputs_and_gradients(linear, x.contiguous(), grad.contiguous())
        for ours, same in zip(found, expected, strict=True):
            assert torch.equal(ours, same)


def test_products_of_a_part_of_the_columns(dtype):
    """As the loss takes them: slices of a wide matrix, written to and read from in place."""
    x, weight, wide = (torch.randn(*shape, dtype=dtype) for shape in ((8, 6), (5, 6), (8, 15)))
    part = wide[:, 5:10]
    assert_equal(grad_input(part, weight).float(), (part.double() @ weight.double()).float(), NEAR[dtype])
    assert_equal(grad_weight(part, x).float(), (part.double().T @ x.double()).float(), NEAR[dtype])
    around = wide.clone()
    matmul_nt(x, weight, out=part)
    assert_equal(part.float(), (x.double() @ weight.double().T).float(), NEAR[dtype])
    assert torch.equal(wide[:, :5], around[:, :5])
    assert torch.equal(wide[:, 10:], around[:, 10:])


def test_a_network_learns_the_same(monkeypatch, dtype):
    model, idx = tiny_model(ModelConfig(**SMALL), dtype=torch.float32), random_tokens(2, 24)

    def loss_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    found = loss_and_gradients()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(idx[:, :-1]).float()
    assert_equal(found[0], cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()), NEAR[dtype])
    for known, off in OFF.items():
        monkeypatch.setattr(products, known, off)
    for ours, expected in zip(found, loss_and_gradients(), strict=True):
        assert_equal(ours, expected, NEAR[dtype])


@pytest.mark.parametrize("dtype", WIDE)
def test_a_convolution_is_taken_from_the_sizes_where_it_is_faster(here, dtype):
    rows, inputs, outputs = WIDE[dtype]
    linear, narrow, wide = (Linear(inputs, n, dtype=dtype) for n in (outputs, outputs - 1, 2 * outputs))
    x = torch.randn(rows, inputs, dtype=dtype)
    assert is_ours(linear(x))
    assert not is_ours(narrow(x))
    assert not is_ours(wide(x[1:]))


COUNTED = {"mm", "addmm", "_linear_pointwise", "convolution", "transposed"}


class Seen(TorchDispatchMode):
    """Counts the products that reach torch's kernels."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in COUNTED:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [
        (torch.float32, 64, {"convolution": 3}),
        (torch.float32, 63, {"mm": 3}),
        (torch.bfloat16, 2048, {"convolution": 3}),
        (torch.bfloat16, 2047, {"convolution": 2, "mm": 1}),
        (torch.bfloat16, 1023, {"mm": 3}),
    ],
)
def test_gradients_are_convolutions_from_sizes_of_their_own(here, dtype, rows, expected):
    linear, x = Linear(512, 1024, bias=False, dtype=dtype), torch.randn(rows, 512, dtype=dtype, requires_grad=True)
    with Seen() as seen:
        linear(x).backward(torch.ones(rows, linear.out_features, dtype=dtype))
    assert seen.counts == expected


@needs_amx
@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        (768, 682, {"addmm": 1, "mm": 2}),
        (768, 683, {"_linear_pointwise": 1, "transposed": 1, "mm": 3}),
        (769, 768, {"_linear_pointwise": 1, "transposed": 1, "mm": 4}),
        (1023, 1024, {"_linear_pointwise": 1, "transposed": 1, "mm": 4}),
        (1023, 1026, {"_linear_pointwise": 1, "transposed": 1, "mm": 2}),
        (1024, 1000, {"_linear_pointwise": 1, "transposed": 1, "mm": 2}),
        (384, 1400, {"_linear_pointwise": 1, "transposed": 1, "mm": 2}),
    ],
)
def test_with_amx_gradients_of_many_weights_are_made_of_a_copy_by_all_threads(monkeypatch, outputs, inputs, expected):
    """In pieces of 384 rows where oneDNN would leave them to one; biases are not copied to each row first."""
    linear, x = Linear(inputs, outputs, dtype=torch.bfloat16), torch.randn(1600, inputs, dtype=torch.bfloat16)
    seen, gradients = {}, {}
    for way in (cpp_ops, OFF["cpp_ops"]):
        monkeypatch.setattr(products, "cpp_ops", way)
        monkeypatch.setattr(products, "convolves", OFF["convolves"])
        linear.zero_grad()
        with Seen() as counted:
            linear(x.requires_grad_()).sum().backward()
        seen[way], gradients[way] = counted.counts, linear.weight.grad.float()
    assert seen == {cpp_ops: expected, OFF["cpp_ops"]: {"addmm": 1, "mm": 2}}
    assert_equal(*gradients.values(), NEAR[torch.bfloat16])


@needs_amx
@pytest.mark.parametrize(("rows", "laid_out"), [(1365, 0), (1366, 1)])
def test_with_amx_gradients_of_few_rows_are_not_made_of_a_copy(monkeypatch, rows, laid_out):
    monkeypatch.setattr(products, "convolves", OFF["convolves"])
    linear, x = Linear(768, 768, dtype=torch.bfloat16), torch.randn(rows, 768, dtype=torch.bfloat16)
    with Seen() as seen:
        linear(x).sum().backward()
    assert seen.counts["transposed"] == laid_out


@needs_amx
def test_compiled_layers_have_such_gradients_too(monkeypatch):
    monkeypatch.setattr(products, "LEAST_COPIED", (1, 1))
    linear, x, grad = (
        Linear(48, 40, dtype=torch.bfloat16),
        *(torch.randn(30, n, dtype=torch.bfloat16) for n in (48, 40)),
    )
    expected = outputs_and_gradients(linear, x, grad)
    seen = []
    keep = lambda graph, _: seen.append(graph.code) or make_boxed_func(graph.forward)
    compiled = torch.compile(linear, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    linear.zero_grad()
    found = outputs_and_gradients(compiled, x, grad)
    assert ["sash.transposed" in code for code in seen] == [False, True]
    for one, other in zip(found, expected, strict=True):
        assert_equal(one.float(), other.float(), NEAR[torch.bfloat16])


@needs_amx
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (31, 64), (64, 31), (33, 65), (200, 96), (0, 5)])
def test_what_is_transposed_is_the_same_numbers(n_threads, shape, threads):
    torch.set_num_threads(n_threads)
    N, C = shape
    wide = torch.arange(N * (C + 9), dtype=torch.int16).view(torch.bfloat16).view(N, C + 9)
    for rows in (wide[:, 5 : 5 + C], wide[:, :C].T.contiguous().T):
        found = products._transposed(rows)
        assert torch.equal(found.view(torch.int16), rows.T.view(torch.int16))
    torch.library.opcheck(products._transposed, (torch.randn(N, C).bfloat16(),))  # for estimates of memory, too


@needs_amx
def test_without_gradients_there_is_nothing_to_lay_out(monkeypatch):
    monkeypatch.setattr(products, "LEAST_COPIED", (1, 1))
    monkeypatch.setattr(products, "convolves", OFF["convolves"])
    linear, x = Linear(8, 6, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    y = linear(x)
    assert is_ours(y)
    monkeypatch.delattr(products, "_Linear")
    with torch.no_grad():
        assert torch.equal(linear(x), y)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "convolution"), (torch.bfloat16, "mm")])
def test_a_part_of_the_columns_is_copied_only_where_that_pays(here, dtype, kind):
    grad, x = torch.randn(2048, 2048, dtype=dtype)[:, :1024], torch.randn(2048, 512, dtype=dtype)
    with Seen() as seen:
        grad_weight(grad, x)
    assert seen.counts == {kind: 1}


def test_autocast_says_what_is_multiplied(here):
    rows, inputs, outputs = WIDE[torch.bfloat16]
    linear, x = Linear(inputs, outputs), torch.randn(rows, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert is_ours(y)
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(y, linear.bfloat16()(x.bfloat16()))


def test_no_convolution_in_float64_or_with_one_thread(here):
    rows, inputs, outputs = WIDE[torch.float32]
    linear, x = Linear(inputs, outputs), torch.randn(rows, inputs)
    assert is_ours(linear(x))
    assert not is_ours(linear.double()(x.double()))
    linear.float()
    torch.set_num_threads(1)
    assert not is_ours(linear(x))


@pytest.mark.parametrize(
    ("cpu", "vectors", "onednn", "convolves"),
    [
        ("AMD EPYC", "AVX512", True, True),
        ("AMD EPYC", "AVX512", False, False),
        ("AMD EPYC", "AVX2", True, False),
        ("Intel Xeon", "AVX512", True, False),
        (None, "AVX512", True, False),
    ],
)
def test_convolutions_only_where_they_were_faster(monkeypatch, threads, cpu, vectors, onednn, convolves):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu} if cpu else {}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    rows, inputs, outputs = WIDE[torch.float32]
    assert is_ours(Linear(inputs, outputs)(torch.randn(rows, inputs))) == convolves


def test_compiled_code_multiplies_as_the_compiler_wants(dtype):
    linear, x = Linear(8, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert is_ours(linear(x))
    seen = []
    torch.compile(linear, backend=lambda graph, _: seen.append(graph.print_readable(False)) or graph.forward)(x)
    assert len(seen) == 1
    assert "linear" in seen[0]
    assert "conv" not in seen[0]
