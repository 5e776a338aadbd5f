"""RoPE by place in the cache instead of by position in the text, as StreamingLLM has it (2309.17453).

    window = 3, n_sink = 1, the query is 7        key      0 1 2 3 4 5 6 7
                                                  place    0         1 2 3      as if what was forgotten had never been

Keys are stored as they are and rotated each time they are read. Distances within the window are those of the text; a
sink's is that from the query's place, which stays n_sink + window - 1 once the cache is full. So no angle ever grows.

Dimensions: B batch, H query heads, K KV heads, T queries, Tk keys, D head_dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.rope import rotate
from model.context import Step

if TYPE_CHECKING:
    from model.mixers.attention import AttentionSpec


def rotate_by_place(
    q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, step: Step, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, T, D) queries and (B, K, Tk, D) keys and values, for attention whose first D outputs count."""
    window, rope = spec.window, spec.rope
    assert window is not None, "only a sliding layer has places"
    assert rope is not None, "only where RoPE is are they of use"
    T, q_pos, n_sink = q.shape[2], step.pos, spec.n_sink
    last_place = n_sink + window - 1
    shift = (q_pos[:, :1] - last_place).clamp(min=0)  # (B or 1, 1) what the first query has forgotten

    def turned(x: Tensor, name: str, pos: Tensor) -> Tensor:
        table = step.once(("in-cache", name, window, n_sink, rope), lambda: rope.table(pos))
        return rotate(x, *table).to(v.dtype)

    if T == 1 or n_sink == 0 or step.past_bound + T <= last_place + 1:  # every query has forgotten as much as the first
        k_place = torch.where(k_pos < n_sink, k_pos, k_pos - shift)
        return turned(q, "query", q_pos - shift), turned(k, "key", k_place), v
    # Each query is at a distance of its own from the sinks: one half of the width has scores with them, the other half
    # those with the window.
    is_sink = (k_pos < n_sink)[:, None, :, None]  # (B or 1, 1, Tk, 1)
    near = turned(q, "query", q_pos - shift), turned(k, "key", k_pos - shift).masked_fill(is_sink, 0)
    far = turned(q, "query of sinks", q_pos.clamp(max=last_place)), turned(k, "sink", k_pos).masked_fill(~is_sink, 0)
    q, k = (torch.cat(pair, dim=-1) for pair in zip(near, far, strict=True))  # (B, H, T, 2 D), (B, K, Tk, 2 D)
    if spec.scale is None:
        q = q * math.sqrt(2)  # scores are divided by the root of the width, which is now 2 D
    return q, k, F.pad(v, (0, spec.head_dim))
