"""Linear layers on a CPU, forward and backward, with the kernel measured as fastest (docs/experiments.md).

AMD EPYC with AVX512-BF16: as convolutions with 1 x 1 kernels. oneDNN packs the weights once for these, and in float32
its convolutions beat MKL's matmul. Intel Xeon with AMX: convolutions are slower; instead large weight gradients first
copy their transposed operand into row order, and are split if oneDNN would run them on a single thread.

Dimensions: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.cpu.cpp_ops import cpp_ops
from model.cpu.processor import convolves

# Measured thresholds: minimum rows and multiply-adds for a matmul to run as a convolution.
LEAST = {torch.bfloat16: (1 << 10, 1 << 27), torch.float32: (1 << 6, 1 << 25)}
LEAST_OF_WEIGHTS = LEAST | {torch.bfloat16: (1 << 11, 1 << 30)}  # thresholds for weight gradients
LEAST_COPIED = 1 << 19, 3 << 28  # weights and multiply-adds from which a transposed copy pays off
LEAST_SHARED = 1 << 20  # output elements below which oneDNN uses a single thread,
FEW_ROWS, MANY_ROWS = 384, 1024  # unless there are at most 384 or at least 1024 rows

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # oneDNN adds the bias; F.linear copies it to each row


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, (..., I) -> (..., O), with the matmuls of this file in its forward and backward."""
    x = _to_autocast_dtype(x)
    learns = torch.is_grad_enabled() and _copy_transposed(x, len(weight))
    if not (learns or _convolve(x, len(weight), LEAST)):
        return F.linear(x, weight, bias)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def _to_autocast_dtype(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype("cpu")) if x.is_cpu and torch.is_autocast_enabled("cpu") else x


def matmul_nt(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x @ weight.T into out: (N, I), (O, I) -> (N, O). No gradients."""
    if _convolve(x, len(weight), LEAST):
        out.copy_(_forward(x, weight, None))
    else:
        torch.mm(x, weight.T, out=out)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight: (N, O), (O, I) -> (N, I)."""
    if not _convolve(grad, weight.shape[1], LEAST):
        return grad @ weight
    return _rows(F.conv_transpose2d(_image(grad), weight[:, :, None, None]))


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x: (N, O), (N, I) -> (O, I)."""
    if _copy_transposed(grad, x.shape[1]):
        return _all_threads(_transposed(grad), x)
    copied = not grad.is_contiguous()  # a slice of a wider matrix; in bfloat16 the copy costs as much as it saves
    if (copied and grad.dtype == torch.bfloat16) or not _convolve(grad, x.shape[1], LEAST_OF_WEIGHTS):
        return grad.T @ x
    return F.conv_transpose2d(x[None, :, :, None], grad[:, :, None, None])[0, :, :, 0]


def _convolve(x: Tensor, others: int, sizes: dict[torch.dtype, tuple[int, int]]) -> bool:
    """Whether (..., C) @ (C, others) is faster as a convolution; never with a single thread."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in sizes:
        return False
    least_rows, least = sizes[x.dtype]
    n = x.numel()
    return n * others >= least and n >= least_rows * x.shape[-1] and torch.get_num_threads() > 1 and convolves()


def _copy_transposed(x: Tensor, others: int) -> bool:
    """Whether a transposed copy of (..., C) speeds up the gradient of a (C, others) weight."""
    least_weights, least = LEAST_COPIED
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.shape[-1] * others < least_weights:
        return False
    return x.numel() * others >= least and cpp_ops() is not None


@torch.library.custom_op("sash::transposed", mutates_args=())
def _transposed(rows: Tensor) -> Tensor:
    """(N, C) -> (C, N), copied into row order by cpp/transpose.cpp."""
    loaded = cpp_ops()
    assert loaded is not None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = _empty_transposed(rows)
    places = out.data_ptr(), out.stride(0), rows.data_ptr(), rows.stride(0)
    loaded.transpose(*places, *rows.shape, torch.get_num_threads())
    return out


@_transposed.register_fake
def _empty_transposed(rows: Tensor) -> Tensor:
    """Output buffer with a padded row stride: rows a power of two apart would compete for the same cache lines."""
    N, C = rows.shape
    return rows.new_empty(C, (N // 32 + 2) * 32)[:, :N]


def _all_threads(rows: Tensor, x: Tensor) -> Tensor:
    """rows @ x, (O, N), (N, I) -> (O, I), split so that all threads work."""
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


class _Linear(torch.autograd.Function):
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
            grad_input(grad, weight) if of_x else None,
            grad_weight(grad, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
