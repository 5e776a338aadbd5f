"""Attention by scores that exist: any positions, and whatever shapes the scores.

Dimensions: B batch, H query heads, K KV heads, R = H / K, Tq and Tk queries and keys, D head_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What makes scores of products, in this order; None where it has no part."""

    scale: float  # products are multiplied by it
    softcap: float | None  # c: c tanh(z / c)
    slopes: Tensor | None  # (H,) what a head's scores lose with each token of distance
    sink_logit: Tensor | None  # (H,) a score in the softmax's denominator that has no value


def masked_scores(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """(B, H, Tq, D) over (B, K, Tk, D) -> (B, H, Tq, D), seeing (B or 1, H or 1, Tq, Tk) where mask is True.

    distance (B or 1, 1, Tq, Tk) is from query back to key.
    """
    B, H, Tq, D = q.shape
    K = k.shape[1]
    rows = (q * shape.scale).reshape(B, K, H // K * Tq, D)
    z = (rows @ k.transpose(2, 3)).view(B, H, Tq, -1)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    p = _probabilities(z, distance, mask, shape)
    p = p.to(v.dtype).reshape(B, K, H // K * Tq, -1)
    return (p @ v).view(B, H, Tq, D)


def one_query(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """The same for Tq = 1, without a matrix product: to be compiled, since otherwise every product would exist."""
    B, H, _, D = q.shape
    K = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(wide) * shape.scale).view(B, K, H // K, 1, D)
    z = (k[:, :, None].to(wide) * q).sum(dim=-1).view(B, H, 1, -1)
    p = _probabilities(z, distance, mask, shape)
    p = p.view(B, K, H // K, -1, 1)
    return (v[:, :, None].to(wide) * p).sum(dim=3).to(v.dtype).view(B, H, 1, D)


def _probabilities(z: Tensor, distance: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """Products to probabilities, (B, H, Tq, Tk) both."""
    if shape.softcap is not None:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    if shape.slopes is not None:
        z = z - shape.slopes[:, None, None] * distance
    z = z.masked_fill(~mask, -torch.inf)
    if shape.sink_logit is None:
        return z.softmax(dim=-1)
    sink = shape.sink_logit.to(z.dtype)[:, None, None].expand(*z.shape[:3], 1)
    return torch.cat((z, sink), dim=-1).softmax(dim=-1)[..., :-1]  # the sink has no value
