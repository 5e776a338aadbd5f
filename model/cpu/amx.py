"""bfloat16 attention with windows and sinks on a CPU with AMX: a custom operator around cpp/attention.cpp.

Dimensions: B batch, H query heads, K KV heads, T keys, Tq queries, D head_dim.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.cpp_ops import cpp_ops

TASKS = 4  # fewest pieces of work per thread in the forward
MULTIPLE = 32  # head widths must be a multiple of this
NEEDS = f"a CPU with AMX, a C++ compiler, bfloat16 and head_dim a multiple of {MULTIPLE}"


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_long),
        ("head", ctypes.c_long),
        ("time", ctypes.c_long),
    )


class _Call(ctypes.Structure):
    """The struct Call of window.h."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("B", "H", "K", "Tq", "T", "D", "window", "n_sink", "parts", "pieces")),
        ("scale", ctypes.c_float),
        ("lse", ctypes.c_void_p),
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
    )


def serves(head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` supports these; the first call compiles the C++."""
    return device.type == "cpu" and dtype == torch.bfloat16 and head_dim % MULTIPLE == 0 and cpp_ops() is not None


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, scale: float | None = None) -> Tensor:
    """(B, H, Tq, D) over (B, K, T, D) keys and (B, K, T, Dv) values -> (B, H, Tq, Dv); scale None: 1 / sqrt(D).

    The queries are at the positions of the last Tq keys; each attends to the last `window` keys (itself included) and
    the first n_sink. If D and Dv differ, the narrower is padded with zeros.
    """
    D, Dv = q.shape[-1], v.shape[-1]
    if Dv == D:
        return amx(q, k, v, window, n_sink, scale)[0]
    scale, width = D**-0.5 if scale is None else scale, max(D, Dv)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return amx(q, k, v, window, n_sink, scale)[0][..., :Dv]


@torch.library.custom_op("sash::amx", mutates_args=())
def amx(q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(B, H, Tq, D) over (B, K, T, D) -> (B, H, Tq, D), and the log-sum-exp of the scores (B, H, Tq), base 2.

    Computed with an online softmax over blocks of keys (2205.14135).
    """
    q, k, v = (_with_rows(x) for x in (q, k, v))
    out, lse = _results(q)
    call = _call(q, k, window, n_sink, scale, backward=False)
    _place(call, lse, q=q, k=k, v=v, out=out)
    _run("forward", call)
    return out, lse


@torch.library.custom_op("sash::amx_backward", mutates_args=())
def amx_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    n_sink: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    grad, q, k, v = (_with_rows(x) for x in (grad, q, k, v))
    call = _call(q, k, window, n_sink, scale, backward=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if call.parts > 1:
        dk, dv = (x.new_empty(call.B, call.K * call.parts, call.T, call.D) for x in (k, v))
    if call.Tq < call.T:  # some keys may not be attended to by any query
        dk.zero_(), dv.zero_()
    _place(call, lse, q=q, k=k, v=v, out=out, grad=grad, dq=dq, dk=dk, dv=dv)
    _run("backward", call)
    if call.parts > 1:
        dk, dv = (x.unflatten(1, (call.K, call.parts)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def work_bytes(q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, *_: Any, backward: bool) -> int:
    """Workspace of a call in bytes, computed from shapes."""
    call = _call(q, k, window, n_sink, None, backward=backward)
    partial = 2 * (call.parts - 1) * k.nbytes  # additional partial gradients of keys and values
    return _memory("backward" if backward else "forward", call) + partial


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs; `out` is stored with time before heads, the layout that the output projection reads."""
    B, H, Tq, D = q.shape
    return q.new_empty(B, Tq, H, D).transpose(1, 2), q.new_empty(B, H, Tq, dtype=torch.float32)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(q: Tensor, k: Tensor, window: int, n_sink: int, scale: float | None, *, backward: bool) -> _Call:
    (B, H, Tq, D), (K, T) = q.shape, k.shape[1:3]
    n_threads, parts, pieces = torch.get_num_threads(), 1, 1
    if backward:  # one thread sums the gradients of a KV head, or several parts that are added afterwards
        parts = min(H // K, -(-n_threads // (B * K)))
    else:
        pieces = -(-TASKS * n_threads // (B * K))
    scale = D**-0.5 if scale is None else scale
    return _Call(B, H, K, Tq, T, D, min(window, T), min(n_sink, T), parts, pieces, scale)


def _place(call: _Call, lse: Tensor, **tensors: Tensor) -> None:
    call.lse = lse.data_ptr()
    for name, x in tensors.items():
        setattr(call, name, _Rows(x.data_ptr(), *x.stride()[:3]))


def _run(name: str, call: _Call) -> None:
    memory = torch.empty(_memory(name, call), dtype=torch.uint8)  # torch aligns it to 64 bytes
    getattr(cpp_ops(), name)(ctypes.byref(call), ctypes.c_void_p(memory.data_ptr()), torch.get_num_threads())


def _memory(name: str, call: _Call) -> int:
    loaded = cpp_ops()
    assert loaded is not None
    assert loaded.call_bytes() == ctypes.sizeof(_Call), "the struct Call differs between window.h and this file"
    return torch.get_num_threads() * getattr(loaded, f"{name}_bytes")(ctypes.byref(call))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(*output, q, k, v)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *amx_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None


amx.register_autograd(_backward, setup_context=_save)
amx.register_fake(lambda q, *_: _results(q))
amx_backward.register_fake(
    lambda grad, out, lse, q, k, v, *_: tuple(torch.empty_like(_with_rows(x)) for x in (q, k, v))
)

WORKSPACE = {  # operator -> its workspace in bytes, and the index of q among its arguments
    torch.ops.sash.amx.default: (work_bytes, 0),
    torch.ops.sash.amx_backward.default: (work_bytes, 3),
}
