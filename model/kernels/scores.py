"""Attention by scores that exist, a tile of queries at a time: any positions, and whatever shapes the scores.

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
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if slopes is not None:
        z = z - slopes[:, None, None] * distance
    z = z.masked_fill(~mask, -torch.inf)
    if sink_logit is None:
        p = z.softmax(dim=-1)
    else:
        sink = sink_logit.to(z.dtype)[:, None, None].expand(B, H, Tq, 1)
        p = torch.cat((z, sink), dim=-1).softmax(dim=-1)[..., :-1]  # the sink has no value
    p = p.to(v.dtype).reshape(B, K, H // K * Tq, -1)
    return (p @ v).view(B, H, Tq, D)
