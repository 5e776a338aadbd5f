"""Cross-entropy from hidden states, a chunk of tokens at a time: the (B, T, V) logits are never stored whole.

For a mean the forward pass also computes the gradients while it has a chunk's logits (2410.10989): three matmuls in
all. For losses per token the weights of the gradients are not known yet, and the backward pass recomputes the logits.
Matmuls run in the autocast dtype, everything between them in float32.

Dimensions: N tokens, C n_embd, V vocab_size.
"""

from typing import Literal

import torch
from torch import Tensor

from model import cpu
from model.constants import IGNORED

CHUNK_ELEMENTS = 1 << 27  # logits that exist at a time: with fewer, adding up the head's gradient costs time


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "none"] = "mean",
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """(..., C) hidden states, (V, C) head, (...) targets -> float32 loss: the mean over targets, or one per token.

    Targets of -100 are ignored. softcap c: logits become c tanh(logits / c) (2408.00118). z_loss adds the gradient of
    z_loss * log(Z)**2 (2204.02311) but not its value: the loss stays the cross-entropy.
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
            assert grads is not None, "the gradients of a mean are computed once: call backward once"
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
    """The loss of each of N tokens and, given the weight of each, the gradients of x and of the head."""
    head = weight.to(dtype)  # (V, C)
    wide = torch.promote_types(dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=wide, device=x.device)
    dx = None if weights is None else torch.zeros_like(x, dtype=wide)
    dweight = None
    n_chunks = max(1, -(-len(targets) * len(head) // CHUNK_ELEMENTS))
    size = max(1, -(-len(targets) // n_chunks))  # equal chunks: each one costs a sum of the head's gradient
    vocabulary_chunk = cpu.vocabulary_chunk(head)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, max(1, len(targets)), size):
            part = slice(start, start + size)
            h = x[part].to(dtype)  # (n, C)
            logits = h.new_empty(len(h), len(head))  # (n, V), later overwritten by their gradient
            column_chunks = logits.split(vocabulary_chunk, dim=1)
            for columns, head_rows in zip(column_chunks, head.split(vocabulary_chunk), strict=True):
                cpu.matmul_nt(h, head_rows, out=columns)
            scale = None if weights is None else weights[part]
            losses[part] = _loss_and_grad(logits, targets[part], scale, softcap, z_loss)
            if dx is None:
                continue
            dweight = torch.zeros_like(weight) if dweight is None else dweight  # now: the buffer of the rows is free
            pieces = (x.split(vocabulary_chunk) for x in (head, dweight))
            for columns, head_rows, dhead_rows in zip(column_chunks, *pieces, strict=True):
                dx[part] += cpu.grad_input(columns, head_rows)
                dhead_rows += cpu.grad_weight(columns, h)
    return losses, None if dx is None else dx.to(x.dtype), dweight


def _loss_and_grad(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float
) -> Tensor:
    """The loss (n,) of (n, V) logits; with weights (n,) the logits are overwritten by their own gradient.

    Some rows at a time in one reused buffer, as many as stay in a CPU's caches; elsewhere all.
    """
    if cpu.loss_and_grad_serves(logits, softcap):
        return cpu.loss_and_grad(logits, targets, weights, z_loss)
    n = cpu.loss_rows_at_once(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    buffer = torch.empty(2, min(n, len(logits)), logits.shape[1], dtype=wide, device=logits.device)
    return torch.cat(
        [
            _rows(rows, goal, None if weights is None else weights[i * n : (i + 1) * n], softcap, z_loss, buffer)
            for i, (rows, goal) in enumerate(zip(logits.split(n), targets.split(n), strict=True))
        ]
    )


def _rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float, buffer: Tensor
) -> Tensor:
    """The same for a few rows; buffer (2, rows or more, V) holds the float32 logits and probabilities."""
    z, p = buffer[:, : len(logits)]
    z.copy_(logits)
    cap_grad = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        cap_grad = 1 - z.square()
        z.mul_(softcap)
    at, real = targets.clamp(min=0)[:, None], targets != IGNORED
    goal = z.gather(1, at)[:, 0]
    torch.softmax(z, dim=1, out=p)
    log_z = z.amax(dim=1) - p.amax(dim=1).log()  # the largest probability is never 0
    if weights is not None:
        scale = (weights * real)[:, None].to(z.dtype)
        p.mul_(scale * (1 + 2 * z_loss * log_z[:, None]))
        p.scatter_add_(1, at, -scale)
        logits.copy_(p if cap_grad is None else p.mul_(cap_grad))
    return (log_z - goal) * real
