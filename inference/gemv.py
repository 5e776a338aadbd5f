"""Small-batch linear layers, written so that Inductor emits one fused GEMV loop: for decoding a token at a time.

Written as elementwise products and their sum, the loop reads each weight once in memory order. Matmul libraries reach a
third of that speed in bfloat16 (docs/experiments/decoding.md).

Dimensions: B rows, C inputs, N outputs.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, (..., C) and (N, C) -> (..., N): each row of weights is read once for all rows of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(wide)  # (B, C)
    y = (weight.to(wide)[:, None] * rows).sum(dim=-1).t()  # (B, N)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous().view(*x.shape[:-1], -1)


def int8_gemv(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """torch._weight_int8pack_mm, (B, C) and (N, C) -> (B, N), for C that 4 divides.

    Four weights are read as one 32-bit word and unpacked by shifts, as multiples of 2^24: processors convert words to
    floating point faster than bytes.
    """
    words, last = weight.view(torch.int32)[:, None], -1 << 24  # (N, 1, C / 4), the first weight in the lowest bits
    each = words << 24, (words << 16) & last, (words << 8) & last, words & last
    rows = torch.cat(x.float().unflatten(-1, (-1, 4)).unbind(-1), dim=-1)  # as they pair with words, and in memory
    y = reduce(add, (w.float() * row for w, row in zip(each, rows.chunk(4, dim=-1), strict=True))).sum(dim=-1)  # (N, B)
    return (y.t() * 2.0**-24 * scale).to(x.dtype).contiguous()  # in this order: float16 has no 2^-24 to spare


GEMVS: dict[
    Callable, tuple[Callable, int, int]
] = {  # operator -> its loop, the most rows it is faster for, and a divisor of C
    F.linear: (gemv, 4, 1),
    torch._weight_int8pack_mm: (int8_gemv, 1, 4),
}


def with_gemv(graph: GraphModule) -> GraphModule:
    """The same graph with matmuls of few rows rewritten as loops."""
    for library, (own, most, divisor) in GEMVS.items():
        for node in graph.graph.find_nodes(op="call_function", target=library):
            shape = node.args[0].meta["example_value"].shape
            if shape.numel() <= most * shape[-1] and shape[-1] % divisor == 0:
                node.target = own
    graph.recompile()
    return graph
