"""Attention that materialises the scores, for any positions and score mods.

Dimensions: B batch, H query heads, K KV heads, R = H / K, Tq and Tk queries and keys, D head_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreMods(NamedTuple):
    """Score modifications, applied to q k in this order; None if unused."""

    scale: float  # factor on q k
    softcap: float | None  # soft-cap c: z becomes c tanh(z / c)
    slopes: Tensor | None  # (H,) ALiBi slopes, subtracted per token of distance
    sink_logit: Tensor | None  # (H,) learned sink: an extra score in the softmax denominator, without a value


def masked_scores(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, mods: ScoreMods) -> Tensor:
    """(B, H, Tq, D) over (B, K, Tk, D) keys and (B, K, Tk, Dv) values -> (B, H, Tq, Dv).

    mask (B or 1, H or 1, Tq, Tk) is True where a query attends to a key; distance (B or 1, 1, Tq, Tk) is from query
    back to key.
    """
    B, H, Tq, D = q.shape
    K = k.shape[1]
    rows = (q * mods.scale).reshape(B, K, H // K * Tq, D)
    z = (rows @ k.transpose(2, 3)).view(B, H, Tq, -1)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    p = _probabilities(z, distance, mask, mods)
    p = p.to(v.dtype).reshape(B, K, H // K * Tq, -1)
    return (p @ v).view(B, H, Tq, -1)


def one_query(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, mods: ScoreMods) -> Tensor:
    """masked_scores for Tq = 1 under torch.compile: without matmuls, Inductor reduces in registers."""
    B, H, _, D = q.shape
    K = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(wide) * mods.scale).view(B, K, H // K, 1, D)
    z = (k[:, :, None].to(wide) * q).sum(dim=-1).view(B, H, 1, -1)
    p = _probabilities(z, distance, mask, mods)
    p = p.view(B, K, H // K, -1, 1)
    return (v[:, :, None].to(wide) * p).sum(dim=3).to(v.dtype).view(B, H, 1, -1)


def _probabilities(z: Tensor, distance: Tensor, mask: Tensor, mods: ScoreMods) -> Tensor:
    """Scaled q k (B, H, Tq, Tk) -> probabilities."""
    if mods.softcap is not None:
        z = mods.softcap * torch.tanh(z / mods.softcap)
    if mods.slopes is not None:
        z = z - mods.slopes[:, None, None] * distance
    z = z.masked_fill(~mask, -torch.inf)
    if mods.sink_logit is None:
        return z.softmax(dim=-1)
    sink = mods.sink_logit.to(z.dtype)[:, None, None].expand(*z.shape[:3], 1)
    return torch.cat((z, sink), dim=-1).softmax(dim=-1)[..., :-1]  # the sink has no value
