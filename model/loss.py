"""Cross-entropy from hidden states, a chunk of tokens at a time: the (B, T, V) logits never exist whole.

For a mean the gradients are made in the forward pass while a chunk's logits exist (2410.10989), three matrix products
in all; for losses by token their weights are not known yet, and the backward pass makes the logits again. Products run
in the autocast dtype, everything between them in float32.

Dimensions: N tokens, C n_embd, V vocab_size.
"""

from typing import Literal

import torch
from torch import Tensor

from model.constants import IGNORED
from model.cpu.cpp_ops import native
from model.cpu.matmul import times, times_transposed, transposed_times

CHUNK_ELEMENTS = 1 << 27  # logits that exist at a time: with fewer, adding up the head's gradient costs time
CACHED_ELEMENTS = 1 << 20  # of them, those that a CPU works on at a time between two matrix products
CACHED_WORDS = 1 << 11  # of the vocabulary, those whose part of the head a CPU multiplies at a time


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "none"] = "mean",
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """(..., C) hidden states, (V, C) head, (...) targets -> float32 loss: the mean over targets, or one for each.

    Targets of -100 count as nothing. softcap c: logits are c tanh(logits / c) (2408.00118). z_loss adds the gradient of
    z_loss * log(Z)**2 (2204.02311) and leaves the value that of cross-entropy alone.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss = _ChunkedCrossEntropy.apply(
        x.flatten(0, -2), weight, targets.flatten(), reduction == "mean", dtype, softcap, z_loss
    )
    return loss.view(targets.shape) if reduction == "none" else loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, mean, dtype, softcap, z_loss):
        count = (targets != IGNORED).sum().clamp(min=1)
        ctx.mean, ctx.numbers = mean, (dtype, softcap, z_loss)
        needs_grad = any(ctx.needs_input_grad)
        if mean and needs_grad:
            weights = torch.ones_like(targets, dtype=torch.promote_types(dtype, torch.float32)) / count
            losses, *ctx.grads = _chunks(x, weight, targets, weights, *ctx.numbers)
        else:
            losses, *_ = _chunks(x, weight, targets, None, *ctx.numbers)
            if needs_grad:
                ctx.save_for_backward(x, weight, targets)
        return losses.sum() / count if mean else losses

    @staticmethod
    def backward(ctx, grad):
        if ctx.mean:
            grads, ctx.grads = ctx.grads, None
            assert grads is not None, "the gradients of a mean are made once: call backward once"
            dx, dweight = (g.mul_(grad) for g in grads)
        else:
            x, weight, targets = ctx.saved_tensors
            _, dx, dweight = _chunks(x, weight, targets, grad, *ctx.numbers)
        return dx, dweight, None, None, None, None, None


def _chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    softcap: float | None,
    z_loss: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each of N tokens and, given what each one weighs, the gradients of x and of the head."""
    head = weight.to(dtype)  # (V, C)
    wide = torch.promote_types(dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=wide, device=x.device)
    dx = None if weights is None else torch.zeros_like(x, dtype=wide)
    dweight = None
    n_chunks = max(1, -(-len(targets) * len(head) // CHUNK_ELEMENTS))
    size = max(1, -(-len(targets) // n_chunks))  # all alike: a small last one costs the sum of head gradients too
    words = CACHED_WORDS if x.device.type == "cpu" else len(head)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, max(1, len(targets)), size):
            part = slice(start, start + size)
            h = x[part].to(dtype)  # (n, C)
            logits = h.new_empty(len(h), len(head))  # (n, V), of which the gradient takes the place
            for of_words, of_head in zip(logits.split(words, dim=1), head.split(words), strict=True):
                times_transposed(h, of_head, out=of_words)
            scale = None if weights is None else weights[part]
            losses[part] = _loss_and_slope(logits, targets[part], scale, softcap, z_loss)
            if dx is None:
                continue
            dweight = torch.zeros_like(weight) if dweight is None else dweight  # now: the room of the rows is free
            parts = zip(logits.split(words, dim=1), head.split(words), dweight.split(words), strict=True)
            for of_words, of_head, of_dweight in parts:
                dx[part] += times(of_words, of_head)
                of_dweight += transposed_times(of_words, h)
    return losses, None if dx is None else dx.to(x.dtype), dweight


def _loss_and_slope(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float
) -> Tensor:
    """The loss (n,) of (n, V) logits; with weights (n,), the logits become their own gradient, in place.

    On a CPU a few rows at a time, all in the same memory, so that what lies between stays in its caches; with AMX a row
    in C++, of which only sums lie between.
    """
    if logits.is_cpu and logits.dtype == torch.bfloat16 and softcap is None and native() is not None:
        return _in_cpp(logits, targets, weights, z_loss)
    n = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    room = torch.empty(2, min(n, len(logits)), logits.shape[1], dtype=wide, device=logits.device)
    return torch.cat(
        [
            _rows(rows, goal, None if weights is None else weights[i * n : (i + 1) * n], softcap, z_loss, room)
            for i, (rows, goal) in enumerate(zip(logits.split(n), targets.split(n), strict=True))
        ]
    )


def _rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float, room: Tensor
) -> Tensor:
    """The same of a few rows; room (2, rows or more, V) is for what lies between."""
    z, p = room[:, : len(logits)]
    z.copy_(logits)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(softcap)
    at, real = targets.clamp(min=0)[:, None], targets != IGNORED
    goal = z.gather(1, at)[:, 0]
    torch.softmax(z, dim=1, out=p)
    log_z = z.amax(dim=1) - p.amax(dim=1).log()  # the largest probability is never 0
    if weights is not None:
        scale = (weights * real)[:, None].to(z.dtype)
        p.mul_(scale * (1 + 2 * z_loss * log_z[:, None]))
        p.scatter_add_(1, at, -scale)
        logits.copy_(p if slope is None else p.mul_(slope))
    return (log_z - goal) * real


@torch.library.custom_op("sash::loss_and_slope", mutates_args=("logits",))
def _in_cpp(logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float) -> Tensor:
    """The same by model/cpp/loss.cpp, of contiguous rows."""
    n, V = logits.shape
    if n and not int(targets.max()) < V:
        raise IndexError(f"target {int(targets.max())} is not one of {V} tokens")
    losses, targets = targets.new_empty(n, dtype=torch.float32), targets.long().contiguous()
    weights = None if weights is None else weights.contiguous()
    loaded = native()
    assert loaded is not None
    places = (None if x is None else x.data_ptr() for x in (losses, logits, targets, weights))
    loaded.loss_and_slope(*places, n, V, IGNORED, z_loss, torch.get_num_threads())
    return losses


_in_cpp.register_fake(lambda logits, targets, *_: targets.new_empty(len(targets), dtype=torch.float32))
