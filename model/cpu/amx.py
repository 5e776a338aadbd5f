"""Attention over windows and sinks in bfloat16 on a CPU with AMX: model/cpp/attention.cpp as an operator.

Dimensions: B batch, H query heads, K KV heads, R = H / K, T keys, Tq queries, D head_dim.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from model.cpu.cpp_ops import native

TASKS = 4  # of a thread in the forward, at least


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_long),
        ("head", ctypes.c_long),
        ("time", ctypes.c_long),
    )


class _Call(ctypes.Structure):
    """As in window.h."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("B", "H", "K", "Tq", "T", "D", "window", "n_sink", "parts", "pieces")),
        ("scale", ctypes.c_float),
        ("lse", ctypes.c_void_p),
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
    )


def serves(head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `amx` can be called with these, which compiles it at first."""
    return device.type == "cpu" and dtype == torch.bfloat16 and head_dim % 32 == 0 and native() is not None


@torch.library.custom_op("sash::amx", mutates_args=())
def amx(q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(B, H, Tq, D) over (B, K, T, D) -> (B, H, Tq, D), and the logarithms of the softmax's sums (B, H, Tq), base 2.

    Queries stand at the last Tq keys, and see each the last `window` keys and the first n_sink. D is a multiple of 32;
    no scale: 1 / sqrt(D). A softmax that goes on from block to block of the keys (2205.14135).
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
    if call.Tq < call.T:  # there may be keys that no query sees
        dk.zero_(), dv.zero_()
    _place(call, lse, q=q, k=k, v=v, out=out, grad=grad, dq=dq, dk=dk, dv=dv)
    _run("backward", call)
    if call.parts > 1:
        dk, dv = (x.unflatten(1, (call.K, call.parts)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def work_bytes(q: Tensor, k: Tensor, window: int, n_sink: int, *_: Any, backward: bool) -> int:
    """What a call holds beside its arguments and results, of shapes alone."""
    call = _call(q, k, window, n_sink, None, backward=backward)
    partial = 2 * (call.parts - 1) * k.nbytes  # gradients of keys and values, more than one of each
    return _memory("backward" if backward else "forward", call) + partial


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """The output lies as the projection after it reads it, time before heads: both keep the same for the backward."""
    B, H, Tq, D = q.shape
    return q.new_empty(B, Tq, H, D).transpose(1, 2), q.new_empty(B, H, Tq, dtype=torch.float32)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(q: Tensor, k: Tensor, window: int, n_sink: int, scale: float | None, *, backward: bool) -> _Call:
    (B, H, Tq, D), (K, T) = q.shape, k.shape[1:3]
    n_threads, parts, pieces = torch.get_num_threads(), 1, 1
    if backward:  # gradients of a KV head are sums of one thread, or added up
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
    memory = torch.empty(_memory(name, call), dtype=torch.uint8)  # which torch aligns to 64 bytes
    getattr(native(), name)(ctypes.byref(call), ctypes.c_void_p(memory.data_ptr()), torch.get_num_threads())


def _memory(name: str, call: _Call) -> int:
    loaded = native()
    assert loaded is not None
    assert loaded.call_bytes() == ctypes.sizeof(_Call), "window.h and this file differ in what a call is"
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
