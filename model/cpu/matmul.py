"""Matrix products with weights, on a CPU in the way that was measured to be the faster one (docs/experiments.md).

On an AMD EPYC with AVX512-BF16 as convolutions with 1 x 1 kernels: oneDNN lays the weights out once for them, and
float32 products are otherwise MKL's. On an Intel Xeon with AMX those are the slower ones; there it is gradients of
weights that pay, if what is transposed in them is laid out anew, and if oneDNN does not leave them to a single thread.

Dimensions: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.cpu.cpp_ops import native
from model.cpu.processor import convolves

LEAST = {torch.bfloat16: (1 << 10, 1 << 27), torch.float32: (1 << 6, 1 << 25)}  # rows, multiplications: measured
LEAST_OF_WEIGHTS = LEAST | {torch.bfloat16: (1 << 11, 1 << 30)}  # for their gradients
LEAST_LAID_OUT = 1 << 19, 3 << 28  # weights, multiplications: from both on gradients are made of a transposed copy
LEAST_SHARED = 1 << 20  # results: of fewer oneDNN leaves a product to one thread,
FEW_ROWS, MANY_ROWS = 384, 1024  # but not of up to 384 rows or from 1024 on

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # oneDNN adds the bias; F.linear copies it to each row


class Linear(nn.Linear):
    """nn.Linear, (..., I) -> (..., O), with the products of this file."""

    def forward(self, x: Tensor) -> Tensor:
        x = to_product_dtype(x)
        learns = torch.is_grad_enabled() and _lay_out(x, self.out_features)
        if not (learns or _convolve(x, self.out_features, LEAST)):
            return F.linear(x, self.weight, self.bias)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def to_product_dtype(x: Tensor) -> Tensor:
    """x as autocast would make it for a matrix product: once, where several products share it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def times_transposed(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """(N, I) times (O, I) transposed, into out (N, O). No gradients."""
    if _convolve(x, len(weight), LEAST):
        out.copy_(_forward(x, weight, None))
    else:
        torch.mm(x, weight.T, out=out)


def times(grad: Tensor, weight: Tensor) -> Tensor:
    """(N, O) times (O, I): what times_transposed gives, back to what it was given."""
    if not _convolve(grad, weight.shape[1], LEAST):
        return grad @ weight
    return _rows(F.conv_transpose2d(_image(grad), weight[:, :, None, None]))


def transposed_times(grad: Tensor, x: Tensor) -> Tensor:
    """(N, O) transposed times (N, I) -> (O, I): the gradient of what times_transposed multiplied by."""
    if _lay_out(grad, x.shape[1]):
        return _in_pieces(_transposed(grad), x)
    copied = not grad.is_contiguous()  # as columns of a wider matrix are; in bfloat16 that takes what would be saved
    if (copied and grad.dtype == torch.bfloat16) or not _convolve(grad, x.shape[1], LEAST_OF_WEIGHTS):
        return grad.T @ x
    return F.conv_transpose2d(x[None, :, :, None], grad[:, :, None, None])[0, :, :, 0]


def _convolve(x: Tensor, others: int, sizes: dict[torch.dtype, tuple[int, int]]) -> bool:
    """Whether (..., C) is multiplied faster as a convolution to `others` columns; with one thread it never is."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in sizes:
        return False
    least_rows, least = sizes[x.dtype]
    n = x.numel()
    return n * others >= least and n >= least_rows * x.shape[-1] and torch.get_num_threads() > 1 and convolves()


def _lay_out(x: Tensor, others: int) -> bool:
    """Whether the gradient of weights between C and `others`, of (..., C), is made faster of a transposed copy."""
    least_weights, least = LEAST_LAID_OUT
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.shape[-1] * others < least_weights:
        return False
    return x.numel() * others >= least and native() is not None


@torch.library.custom_op("sash::transposed", mutates_args=())
def _transposed(rows: Tensor) -> Tensor:
    """(N, C) -> (C, N), laid out anew by model/cpp."""
    loaded = native()
    assert loaded is not None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = _room_of_transposed(rows)
    places = out.data_ptr(), out.stride(0), rows.data_ptr(), rows.stride(0)
    loaded.transpose(*places, *rows.shape, torch.get_num_threads())
    return out


@_transposed.register_fake
def _room_of_transposed(rows: Tensor) -> Tensor:
    """More than N from row to row: rows that are a power of two apart share places in the cache."""
    N, C = rows.shape
    return rows.new_empty(C, (N // 32 + 2) * 32)[:, :N]


def _in_pieces(rows: Tensor, x: Tensor) -> Tensor:
    """(O, N) times (N, I) -> (O, I), with all threads."""
    if len(rows) * x.shape[1] >= LEAST_SHARED or not FEW_ROWS < len(rows) < MANY_ROWS:
        return rows @ x
    return torch.cat([some @ x for some in rows.chunk(-(-len(rows) // FEW_ROWS))])


def _image(rows: Tensor) -> Tensor:
    """(N, C) -> (1, C, N, 1), an image of N pixels, channels last."""
    return rows.contiguous().view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    return image[0, :, :, 0].t()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _convolve(x, len(weight), LEAST):
        if bias is None or _linear is None or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        return _linear(x, weight, bias, "none", [], "")
    return _rows(F.conv2d(_image(x), weight[:, :, None, None], bias))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times(grad, weight) if of_x else None,
            transposed_times(grad, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
