"""The attention mask: which query attends to which key.

window = 3, n_sink = 1            key  0 1 2 3 4 5
                          query 0      x
the sink stays visible          1      x x
beside the last 3 keys,         2      x x x
the query's own included        3      x x x x
                                4      x   x x x
                                5      x     x x x
"""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from model.attention.sparse import Sparse
from model.context import PADDING


class Visibility(Protocol):
    """The numbers of an AttentionSpec that the mask depends on."""

    @property
    def window(self) -> int | None: ...

    @property
    def n_sink(self) -> int: ...

    @property
    def sparse(self) -> Sparse | None: ...


def attention_mask(q_pos: Tensor, k_pos: Tensor, spec: Visibility, star_context: Tensor | None = None) -> Tensor:
    """(B, Tq) and (B, Tk) positions -> bool (B, 1, Tq, Tk), True where the query attends to the key.

    The only definition. star_context (B or 1,): as in ForwardContext.
    """
    q, k = q_pos[:, None, :, None], k_pos[:, None, None, :]
    mask = (k >= 0) & mask_mod(q, k, spec.window, spec.n_sink)
    if spec.sparse is not None:
        further = (k >= 0) & (k <= q) & spec.sparse.mask_mod(q, k, star_context)
        mask = further if spec.window is None else further | mask
    return mask | ((q == PADDING) & (k == PADDING))  # a row that attends to nothing would be NaN on some devices


@lru_cache
def count_visible(spec: Visibility, T: int) -> int:
    """(query, key) pairs of T tokens where the mask is True, counted."""
    pos = torch.arange(T)[None]
    return sum(int(attention_mask(rows, pos, spec).sum()) for rows in pos.split(256, dim=1))


def mask_mod(q: Tensor, k: Tensor, window: int | None, n_sink: int) -> Tensor:
    """The rule between real positions, of any shapes that broadcast: kernels build their masks from it."""
    past = k <= q
    return past if window is None else past & ((q - k < window) | (k < n_sink))
