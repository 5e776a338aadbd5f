"""Who sees whom.

window = 3, n_sink = 1            key  0 1 2 3 4 5
                          query 0      x
the sink stays visible          1      x x
beside the last 3 keys,         2      x x x
the query's own included        3      x x x x
                                4      x   x x x
                                5      x     x x x
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.context import PADDING

if TYPE_CHECKING:
    from model.mixers.attention import AttentionSpec


def visible(q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec, context: Tensor | None = None) -> Tensor:
    """(B, Tq) and (B, Tk) positions -> bool (B, 1, Tq, Tk), True where the query sees the key: the only definition.

    context (B or 1,): the step's, where it has one.
    """
    q, k = q_pos[:, None, :, None], k_pos[:, None, None, :]
    seen = (k >= 0) & sees(q, k, spec.window, spec.n_sink)
    if spec.sparse is not None:
        further = (k >= 0) & (k <= q) & spec.sparse.sees(q, k, context)
        seen = further if spec.window is None else further | seen
    return seen | ((q == PADDING) & (k == PADDING))  # a row that sees nothing would be NaN on some devices


@lru_cache
def n_visible(spec: AttentionSpec, T: int) -> int:
    """Visible (query, key) pairs of T tokens, counted."""
    pos = torch.arange(T)[None]
    return sum(int(visible(rows, pos, spec).sum()) for rows in pos.split(256, dim=1))


def sees(q: Tensor, k: Tensor, window: int | None, n_sink: int) -> Tensor:
    """The rule between real positions, of any shapes that broadcast: kernels build their masks of it."""
    past = k <= q
    return past if window is None else past & ((q - k < window) | (k < n_sink))
