"""CPU-specific code behind one facade: code outside this package calls these functions for any device.

Each function calls torch's operator by default. If Sash's own code is faster for the processor, dtype and sizes
(docs/experiments.md), it runs instead, with the same result up to rounding. One switch turns all of it off, for
comparison and debugging:

    SASH_CPU=off python train.py ...        for a whole process
    with cpu.switched_off(): ...            for a block of code

Dimensions: N rows, I inputs, O outputs, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu import amx, loss_rows, matmul
from model.cpu.cpp_build import compiler, keep_compiled_code
from model.cpu.malloc import keep_freed_memory
from model.cpu.norm import RMSNormFunction
from model.cpu.processor import has_avx512_bf16, multiplies_bf16
from model.cpu.processor import name as processor_name
from model.cpu.switch import is_on, switched_off

__all__ = [
    "FEWEST_QUERIES",
    "attention",
    "attention_needs",
    "attention_serves",
    "attention_workspace",
    "compiler",
    "grad_input",
    "grad_weight",
    "has_avx512_bf16",
    "is_on",
    "keep_compiled_code",
    "keep_freed_memory",
    "linear",
    "loss_and_grad",
    "loss_and_grad_serves",
    "loss_rows_at_once",
    "matmul_nt",
    "multiplies_bf16",
    "prefers_tiles",
    "processor_name",
    "rms_norm",
    "switched_off",
    "vocabulary_chunk",
]

FEWEST_QUERIES = 32  # queries from which AMX attention is fastest, and tiles beat a mask over a cache (measured)
TILES_FROM = 128  # tokens from which tiles beat torch's fused bfloat16 attention (measured)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, (..., I) and (O, I) -> (..., O), with gradients."""
    return matmul.linear(x, weight, bias) if is_on() else F.linear(x, weight, bias)


def matmul_nt(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x @ weight.T into out: (N, I) and (O, I) -> (N, O). No gradients."""
    if is_on():
        matmul.matmul_nt(x, weight, out)
    else:
        torch.mm(x, weight.T, out=out)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight, (N, O) and (O, I) -> (N, I): the gradient of a linear layer's input."""
    return matmul.grad_input(grad, weight) if is_on() else grad @ weight


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x, (N, O) and (N, I) -> (O, I): the gradient of a linear layer's weight."""
    return matmul.grad_weight(grad, x) if is_on() else grad.T @ x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension, with gradients."""
    if x.is_cpu and is_on() and not torch.compiler.is_compiling():
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def loss_rows_at_once(logits: Tensor) -> int:
    """Rows of (N, V) logits to process at a time: on a CPU as many as fit in its caches, otherwise all."""
    return loss_rows.rows_at_once(logits) if logits.is_cpu and is_on() else max(1, len(logits))


def vocabulary_chunk(head: Tensor) -> int:
    """Rows of a (V, C) head to multiply at a time: on a CPU as many as fit in its caches, otherwise all."""
    return loss_rows.VOCABULARY_CHUNK if head.is_cpu and is_on() else len(head)


def loss_and_grad_serves(logits: Tensor, softcap: float | None) -> bool:
    """Whether loss_and_grad supports these logits."""
    return is_on() and loss_rows.serves(logits, softcap)


loss_and_grad = loss_rows.loss_and_grad


def attention_serves(head_dim: int, v_head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` supports these; the first call compiles its C++."""
    return is_on() and amx.serves(max(head_dim, v_head_dim), device, dtype)


attention = amx.attention
attention_needs = amx.NEEDS
attention_workspace = amx.WORKSPACE


def prefers_tiles(T: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles beat torch's fused causal attention without a window: its bfloat16 backward is slow on a CPU."""
    return is_on() and device.type == "cpu" and dtype == torch.bfloat16 and T >= TILES_FROM
