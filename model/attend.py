"""The one call of an attention kernel, and which kernel it takes.

| kernel               | serves                                                                       |
|----------------------|------------------------------------------------------------------------------|
| sdpa-causal          | torch's fused causal attention, where no window hides anything               |
| sdpa-causal-gqa      | the same, reading a KV head for several query heads                          |
| sdpa-causal-expanded | the same, a KV head copied for several query heads, since no fused kernel of |
|                      | the device reads it so                                                       |
| tiles                | windows, sinks, fewer KV heads, any device; work in proportion to the window |
| flex                 | the same on CUDA, fused                                                      |
| masked               | any positions: chunks over a cache, padding; a mask of bounded size          |

Dimensions: B batch, H query heads, K KV heads, Tq and Tk queries and keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.kernels.flex import block_mask, flex
from model.kernels.tiles import block_size, tiles
from model.step import Step
from model.visible import visible

if TYPE_CHECKING:
    from model.mixers.attention import AttentionSpec

Kernel = Literal["auto", "sdpa", "tiles", "flex", "masked"]

MASK_ELEMENTS = 1 << 22  # the largest piece of a mask that exists at a time
HALF = (torch.bfloat16, torch.float16)


def kernel_name(
    spec: AttentionSpec, T: int, device: torch.device, dtype: torch.dtype, *, contiguous: bool = True
) -> str:
    """The kernel for T queries, known before it runs so that every figure can carry it.

    UserError where the one that spec.kernel asks for cannot serve: nothing else is taken silently.
    """
    if not contiguous:
        return "masked"
    slides = spec.window is not None and spec.window < T
    asked = spec.kernel
    if asked == "sdpa" and slides:
        raise UserError(
            f"kernel (sdpa) knows no window ({spec.window} of {T} tokens): take tiles, flex, masked or auto"
        )
    if asked == "flex" and device.type != "cuda":
        raise UserError(f"kernel (flex) needs cuda, not {device.type}: take tiles or auto")
    if asked == "auto":
        if slides:
            asked = "flex" if device.type == "cuda" else "tiles"
        else:  # on a CPU the fused kernel multiplies bfloat16 no faster than float32
            asked = "tiles" if device.type == "cpu" and dtype == torch.bfloat16 and T >= 128 else "sdpa"
    if asked != "sdpa":
        return asked
    if spec.n_kv_head == spec.n_head:
        return "sdpa-causal"
    return "sdpa-causal-gqa" if device.type == "cuda" and dtype in HALF else "sdpa-causal-expanded"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    spec: AttentionSpec,
    *,
    contiguous: bool = False,
    shared: dict | None = None,
) -> Tensor:
    """(B, H, Tq, D) queries at q_pos over (B, K, Tk, D) keys and values at k_pos, (B or 1, T) each -> (B, H, Tq, D).

    contiguous: queries and keys are one run of positions from 0, so that kernels which know no positions may serve.
    `shared` is the step's, where `prepare` left what they need.
    """
    T = q.shape[2]
    match kernel_name(spec, T, q.device, q.dtype, contiguous=contiguous):
        case "masked":
            return _masked(q, k, v, q_pos, k_pos, spec)
        case "tiles":
            window = T if spec.window is None else min(spec.window, T)
            return tiles(q, k, v, window, spec.n_sink, block_size(window, q.dtype))
        case "flex":
            return flex(q, k, v, (shared or {})[_mask_key(spec)])
        case "sdpa-causal-expanded":
            k, v = (x.repeat_interleave(spec.n_head // spec.n_kv_head, dim=1) for x in (k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


def prepare(spec: AttentionSpec, step: Step, device: torch.device, dtype: torch.dtype) -> None:
    """Leave in step.shared what a kernel needs beside its tensors: outside of compiled code, once for equal layers."""
    T = step.pos.shape[1]
    if step.contiguous and kernel_name(spec, T, device, dtype) == "flex":
        step.once(_mask_key(spec), lambda: block_mask(T, spec.window, spec.n_sink, device))


def _mask_key(spec: AttentionSpec) -> tuple:
    return "block_mask", spec.window, spec.n_sink


def _masked(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec) -> Tensor:
    """Any positions, a tile of queries at a time; the query heads of a KV head become rows of one head, uncopied."""
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
