"""Causal sliding-window attention with FlexAttention (2412.05496), for CUDA, inside and outside torch.compile."""

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.attention.mask import mask_mod


@lru_cache(maxsize=32)
def block_mask(T: int, window: int | None, n_sink: int, device: torch.device) -> BlockMask:
    """The (128, 128) blocks with any visible key; created outside compiled code and cached."""

    def rule(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(q, k, window, n_sink)

    return create_block_mask(rule, None, None, T, T, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """(B, H, T, D) over (B, K, T, D) keys and (B, K, T, Dv) values -> (B, H, T, Dv); skips blocks outside the mask."""
    attention = flex_attention if torch.compiler.is_compiling() else _compiled()
    return attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled():
    """flex_attention under torch.compile; uncompiled it would materialise all T x T scores."""
    return torch.compile(flex_attention, dynamic=False)
