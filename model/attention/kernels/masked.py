"""Attention with a mask over any positions: small chunks over a cache, padding, sparse patterns. Skips no work.

Processes a tile of queries at a time, so that masks and scores have at most MASK_ELEMENTS elements.

Dimensions: B batch, H query heads, K KV heads, Tq and Tk queries and keys, D head_dim, Dv width of values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.scores import ScoreMods, masked_scores
from model.attention.mask import Visibility, attention_mask

MASK_ELEMENTS = 1 << 22  # most elements of a mask, or of scores, at a time
ALL = slice(None)


class Positions(NamedTuple):
    """The arguments of attention_mask: which queries attend to which keys."""

    q_pos: Tensor  # (B or 1, Tq)
    k_pos: Tensor  # (B or 1, Tk)
    spec: Visibility
    star_context: Tensor | None  # (B or 1,)

    @property
    def rows(self) -> int:
        return max(len(self.q_pos), 1 if self.star_context is None else len(self.star_context))

    def mask(self, queries: slice = ALL) -> Tensor:
        """The mask (B or 1, 1, Tq, Tk) of these queries."""
        return attention_mask(self.q_pos[:, queries], self.k_pos, self.spec, self.star_context)

    def distance(self, queries: slice = ALL) -> Tensor:
        """Distances (B or 1, 1, Tq, Tk) from each query back to each key."""
        return (self.q_pos[:, queries, None] - self.k_pos[:, None])[:, None]


def masked(q: Tensor, k: Tensor, v: Tensor, positions: Positions, scale: float | None) -> Tensor:
    """(B, H, Tq, D) over (B, K, Tk, D) keys and (B, K, Tk, Dv) values -> (B, H, Tq, Dv), with torch's attention.

    The query heads of a KV head are folded into the rows of one head, so that keys are not copied.
    """
    B, H, Tq, _ = q.shape
    K, Tk = k.shape[1:3]
    q = q.view(B, K, H // K, Tq, -1)
    tile = max(1, MASK_ELEMENTS // (Tk * (H // K) * positions.rows))
    out = []
    for start in range(0, Tq, tile):
        queries = slice(start, start + tile)
        q_tile = q[:, :, :, queries]  # (B, K, H / K, tile, D)
        mask = positions.mask(queries).repeat(1, 1, H // K, 1)  # (B, 1, H / K * tile, Tk)
        y = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k, v, attn_mask=mask, scale=scale)
        out.append(y.view(B, K, H // K, -1, y.shape[-1]))
    return torch.cat(out, dim=3).view(B, H, Tq, -1)


def masked_with_mods(q: Tensor, k: Tensor, v: Tensor, positions: Positions, mods: ScoreMods) -> Tensor:
    """Masked attention with score mods, which need materialised scores; shapes as in `masked`."""
    B, H, Tq, _ = q.shape
    tile = max(1, MASK_ELEMENTS // (B * H * k.shape[2]))
    tiles = [slice(start, start + tile) for start in range(0, Tq, tile)]
    out = [masked_scores(q[:, :, rows], k, v, positions.distance(rows), positions.mask(rows), mods) for rows in tiles]
    return torch.cat(out, dim=2)
