"""Cross-entropy from hidden states, a chunk of tokens at a time: the (B, T, V) logits never exist whole.

Dimensions: N tokens, C n_embd, V vocab_size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 23  # logits that exist at a time


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """(..., C) hidden states, (V, C) head, (...) targets -> float32 loss: the mean over targets, or one for each.

    Targets of -100 count as nothing.
    """
    flat, goal = x.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    losses = torch.cat(
        [
            checkpoint(_chunk_loss, h, weight, t, use_reentrant=False)
            if torch.is_grad_enabled()
            else _chunk_loss(h, weight, t)
            for h, t in zip(flat.split(size), goal.split(size), strict=True)
        ]
    )  # (N,)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (goal != -100).sum().clamp(min=1)


def _chunk_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")
