"""The forward of `model.kernels.tiles` through torch's fused attention, which with AMX is the faster one.

Dimensions: as there: B batch, H query heads, K KV heads, R = H / K, T time, D head_dim, b block, S sinks, L keys of the
band.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model.kernels.room import Tile
    from model.kernels.tiles import Tiling

KEYS_AT_A_TIME = 512  # of which torch's kernel has scores, and their probabilities, in each thread


def fused_forward(tiling: Tiling, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, Tq, D) over (B, K, T, D) -> (B, H, Tq, D), laid out as q: a tile at a time, or all if none hides a key."""
    R = q.shape[1] // k.shape[1]
    if tiling.window >= tiling.T == q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=tiling.scale, enable_gqa=R > 1)
    out = torch.empty_like(q)
    mask, made_of = q.new_empty(0, 0), None
    by_kv_head = [x.unflatten(1, (-1, R)) for x in (q, out)]
    for tile in tiling:
        rows, place = (x[:, :, :, tile.rows] for x in by_kv_head)  # (B, K, R, b, D)
        keys, values, edges = _columns(tile, k), _columns(tile, v), tiling.edges(tile, q)
        if edges is not made_of or mask.shape[1] != keys.shape[2]:
            del mask  # before the next one is there
            mask, made_of = _mask(tile, edges, keys.shape[2]).repeat(R, 1), edges
        y = F.scaled_dot_product_attention(rows.flatten(2, 3), keys, values, attn_mask=mask, scale=tiling.scale)
        place.copy_(y.view(place.shape))
    return out


def _columns(tile: Tile, x: Tensor) -> Tensor:
    """The tile's rows of (B, K, T, D) -> (B, K, S + L, D)."""
    band = x[:, :, tile.low : tile.stop]
    return torch.cat((x[:, :, : tile.n_sink], band), dim=2) if tile.n_sink else band


def _mask(tile: Tile, edges: list[Tensor], n_columns: int) -> Tensor:
    """(b, S + L), added to scores."""
    newest, oldest = edges
    mask = newest.new_zeros(len(newest), n_columns)
    mask[:, n_columns - len(newest) :] = newest
    mask[:, tile.n_sink : tile.n_sink + oldest.shape[1]] += oldest
    return mask


def fused_work_bytes(tiling: Tiling, q: Tensor, k: Tensor) -> int:
    """What fused_forward holds beside arguments and result, of shapes alone."""
    (B, H, Tq, D), K = q.shape, k.shape[1]
    R, size = H // K, q.element_size()
    whole = tiling.window >= tiling.T == Tq
    n = tiling.T if whole else max(tile.n_sink + tile.stop - tile.low for tile in tiling)
    n_queries = Tq if whole else R * min(tiling.block, Tq)
    packed = 2 * B * K * n * D * size  # torch lays keys and values out anew
    by_thread = _rows_at_a_time(n_queries) * (min(KEYS_AT_A_TIME, n) * (4 + size) + 2 * D * 4)
    used = packed + torch.get_num_threads() * by_thread
    if whole:
        return used
    masks = (n_queries * n + 2 * tiling.block**2) * size
    return used + (packed if any(tile.n_sink for tile in tiling) else 0) + masks + B * K * n_queries * D * size


def _rows_at_a_time(n_queries: int) -> int:
    """As torch chooses them for a thread."""
    return min(n_queries, 256 if n_queries >= 768 else 128 if n_queries >= 192 else 32)
