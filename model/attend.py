"""Who sees whom, and the one call of a kernel.

    window = 3, n_sink = 1            key  0 1 2 3 4 5
                              query 0      x
    the sink stays visible          1      x x
    beside the last 3 keys,         2      x x x
    the query's own included        3      x x x x
                                    4      x   x x x
                                    5      x     x x x

Dimensions: B batch, H query heads, K KV heads, Tq and Tk queries and keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.step import PADDING

if TYPE_CHECKING:
    from model.mixers.attention import AttentionSpec

MASK_ELEMENTS = 1 << 22  # the largest piece of a mask that exists at a time


def visible(q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec) -> Tensor:
    """(B, Tq) and (B, Tk) positions -> bool (B, 1, Tq, Tk), True where the query sees the key: the only definition."""
    q, k = q_pos[:, None, :, None], k_pos[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if spec.window is not None:
        seen &= (q - k < spec.window) | (k < spec.n_sink)
    return seen | ((q == PADDING) & (k == PADDING))  # a row that sees nothing would be NaN on some devices


def kernel_name(spec: AttentionSpec, T: int, *, contiguous: bool) -> str:
    """The kernel that attend takes for T queries: known before it runs, so that every figure can carry it."""
    if contiguous and (spec.window is None or spec.window >= T):
        return "sdpa-causal" if spec.n_kv_head == spec.n_head else "sdpa-causal-expanded"
    return "sdpa-masked"


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec, *, contiguous: bool = False
) -> Tensor:
    """(B, H, Tq, D) queries over (B, K, Tk, D) keys and values -> (B, H, Tq, D).

    contiguous: q, k and v are one run of positions from 0, so that kernels which know no positions may serve.
    """
    name = kernel_name(spec, q.shape[2], contiguous=contiguous)
    if name == "sdpa-masked":
        return _masked(q, k, v, q_pos, k_pos, spec)
    if name == "sdpa-causal-expanded":
        k, v = (x.repeat_interleave(spec.n_head // spec.n_kv_head, dim=1) for x in (k, v))  # (B, H, Tk, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec) -> Tensor:
    """Any positions, by a mask of bounded size: a tile of queries at a time.

    The query heads of a KV head become rows of one head, so that no key or value is copied.
    """
    B, H, Tq, D = q.shape
    K, Tk = k.shape[1:3]
    q = q.view(B, K, H // K, Tq, D)
    tile = max(1, MASK_ELEMENTS // (Tk * (H // K) * len(q_pos)))
    out = []
    for start in range(0, Tq, tile):
        q_tile = q[:, :, :, start : start + tile]  # (B, K, H / K, tile, D)
        mask = visible(q_pos[:, start : start + tile], k_pos, spec)  # (B, 1, tile, Tk)
        mask = mask.repeat(1, 1, H // K, 1)  # (B, 1, H / K * tile, Tk)
        y = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k, v, attn_mask=mask)
        out.append(y.view(B, K, H // K, -1, D))
    return torch.cat(out, dim=3).view(B, H, Tq, D)
