"""Attention by scores that exist: any positions, and whatever shapes the scores.

Dimensions: B batch, H query heads, K KV heads, R = H / K, Tq and Tk queries and keys, D head_dim.
"""

import torch
from torch import Tensor


def masked_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    sink_logit: Tensor | None,
) -> Tensor:
    """(B, H, Tq, D) over (B, K, Tk, D) -> (B, H, Tq, D), seeing (B or 1, H or 1, Tq, Tk) where mask is True.

    distance (B or 1, 1, Tq, Tk) is from query back to key; slopes and sink_logit are (H,), as in `tiles`.
    """
    B, H, Tq, D = q.shape
    K = k.shape[1]
    rows = (q * scale).reshape(B, K, H // K * Tq, D)
    z = (rows @ k.transpose(2, 3)).view(B, H, Tq, -1)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    p = _probabilities(z, distance, mask, softcap, slopes, sink_logit)
    p = p.to(v.dtype).reshape(B, K, H // K * Tq, -1)
    return (p @ v).view(B, H, Tq, D)


def one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    sink_logit: Tensor | None,
) -> Tensor:
    """The same for Tq = 1, without a matrix product: to be compiled, since otherwise every product would exist."""
    B, H, _, D = q.shape
    K = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(wide) * scale).view(B, K, H // K, 1, D)
    z = (k[:, :, None].to(wide) * q).sum(dim=-1).view(B, H, 1, -1)
    p = _probabilities(z, distance, mask, softcap, slopes, sink_logit)
    p = p.view(B, K, H // K, -1, 1)
    return (v[:, :, None].to(wide) * p).sum(dim=3).to(v.dtype).view(B, H, 1, D)


def _probabilities(
    z: Tensor,
    distance: Tensor,
    mask: Tensor,
    softcap: float | None,
    slopes: Tensor | None,
    sink_logit: Tensor | None,
) -> Tensor:
    """Scores to probabilities, (B, H, Tq, Tk) both."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if slopes is not None:
        z = z - slopes[:, None, None] * distance
    z = z.masked_fill(~mask, -torch.inf)
    if sink_logit is None:
        return z.softmax(dim=-1)
    sink = sink_logit.to(z.dtype)[:, None, None].expand(*z.shape[:3], 1)
    return torch.cat((z, sink), dim=-1).softmax(dim=-1)[..., :-1]  # the sink has no value
