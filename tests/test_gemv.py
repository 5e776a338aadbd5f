"""Products of few rows as sums: those of the library, in the graph of a compiler alone, and only where they pay."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal

from inference.gemv import gemv, int8_gemv, with_gemv
from model.int8 import to_int8

NEAR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # how near a result can be, of the largest


def in_int8(n_outputs: int, n_inputs: int, dtype: torch.dtype):
    """Weights that use every whole number from -127 to 127 somewhere, and their scales."""
    weight, scale = to_int8(torch.randn(n_outputs, n_inputs), dtype)
    weight.view(-1)[:255] = torch.arange(-127, 128, dtype=torch.int8)
    return weight, scale[:, 0]


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_products_of_few_rows_are_those_of_all(rows):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(20, 7, dtype=torch.float64), torch.randn(rows, 1, 20, dtype=torch.float64)
    assert_equal(gemv(x, linear.weight, linear.bias), linear(x))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", NEAR)
def test_words_of_four_weights_give_the_product(rows, dtype):
    torch.manual_seed(0)
    weight, scale = in_int8(40, 64, dtype)
    x = torch.randn(rows, 64, dtype=dtype)
    exact = x.double() @ weight.double().t() * scale.double()
    y = int8_gemv(x, weight, scale)
    assert y.dtype == dtype
    assert_equal(y.double(), exact, NEAR[dtype] * exact.abs().max().item())


@pytest.mark.parametrize(
    ("rows", "inputs", "replaced"), [(1, 64, (gemv, int8_gemv)), (4, 64, (gemv,)), (5, 64, ()), (1, 62, (gemv,))]
)
def test_which_products_a_compiled_step_writes_as_sums(rows, inputs, replaced):
    weight, scale = in_int8(40, inputs, torch.float32)
    x, called = torch.randn(rows, inputs), []
    both = lambda x: F.linear(x, weight.float()) * scale + torch._weight_int8pack_mm(x, weight, scale)

    def look(graph, inputs):
        called.extend(node.target for node in with_gemv(graph).graph.nodes)
        return graph.forward

    assert_equal(torch.compile(both, fullgraph=True, backend=look)(x), both(x), 1e-4)
    assert {x for x in called if x in (gemv, int8_gemv)} == set(replaced)
