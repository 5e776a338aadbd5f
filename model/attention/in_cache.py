"""RoPE by place in the cache instead of by position in the text (StreamingLLM, 2309.17453).

    window = 3, n_sink = 1, the query is 7        key      0 1 2 3 4 5 6 7
                                                  place    0         1 2 3      evicted keys leave no gap

Keys are stored unrotated and rotated each time they are read. Distances within the window are those of the text; the
distance of a sink is that from the query's place, which stays n_sink + window - 1 once the cache is full. So no angle
ever grows.

Dimensions: B batch, H query heads, K KV heads, T queries, Tk keys, D head_dim, Dv width of values.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.rope import rotate
from model.attention.spec import AttentionSpec
from model.context import ForwardContext


def rotate_by_place(
    q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, ctx: ForwardContext, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated (B, H, T, D) queries, (B, K, Tk, D) keys, and (B, K, Tk, Dv) values: all may come back 2 D wide.

    Of what attention then returns the first Dv channels count.
    """
    window, rope = spec.window, spec.rope
    assert window is not None, "only sliding layers have places"
    assert rope is not None, "only RoPE needs places"
    T, q_pos, n_sink = q.shape[2], ctx.pos, spec.n_sink
    last_place = n_sink + window - 1
    shift = (q_pos[:, :1] - last_place).clamp(min=0)  # (B or 1, 1) tokens evicted before the first query

    def turned(x: Tensor, name: str, pos: Tensor) -> Tensor:
        table = ctx.memo(("in-cache", name, window, n_sink, rope), lambda: rope.table(pos))
        return rotate(x, *table).to(v.dtype)

    if T == 1 or n_sink == 0 or ctx.past_bound + T <= last_place + 1:  # the same for every query
        k_place = torch.where(k_pos < n_sink, k_pos, k_pos - shift)
        return turned(q, "query", q_pos - shift), turned(k, "key", k_place), v
    # Each query is at its own distance from the sinks: one half of the width scores the window, the other the sinks.
    is_sink = (k_pos < n_sink)[:, None, :, None]  # (B or 1, 1, Tk, 1)
    near = turned(q, "query", q_pos - shift), turned(k, "key", k_pos - shift).masked_fill(is_sink, 0)
    far = turned(q, "query of sinks", q_pos.clamp(max=last_place)), turned(k, "sink", k_pos).masked_fill(~is_sink, 0)
    q, k = (torch.cat(pair, dim=-1) for pair in zip(near, far, strict=True))  # (B, H, T, 2 D), (B, K, Tk, 2 D)
    if spec.scale is None:
        q = q * math.sqrt(2)  # scores are divided by the root of the width, which is now 2 D
    return q, k, F.pad(v, (0, 2 * spec.head_dim - spec.v_width))
