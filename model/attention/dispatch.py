"""The one call of an attention kernel, and which kernel it takes.

| kernel               | serves                                                                       |
|----------------------|------------------------------------------------------------------------------|
| sdpa-causal          | torch's fused causal attention, where no window hides anything               |
| sdpa-causal-gqa      | the same, reading a KV head for several query heads                          |
| sdpa-causal-expanded | the same, a KV head copied for several query heads, since no fused kernel of |
|                      | the device reads it so                                                       |
| tiles                | windows, sinks, fewer KV heads, any device; work in proportion to the window;|
|                      | and what shapes the scores: soft-caps, ALiBi, learned sinks; on a CPU chunks |
|                      | over a cache too, where all rows have come equally far                       |
| amx                  | windows, sinks, fewer KV heads in bfloat16 on a CPU with AMX and a compiler, |
|                      | with or without a window; chunks over a cache too                            |
| flex                 | windows and sinks on CUDA, fused                                             |
| masked               | any positions: small chunks over a cache, padding; any pattern; a mask of    |
|                      | bounded size, and no work saved                                              |
| masked-scores        | the same for shaped scores, which then exist, in pieces of bounded size      |
| one-query            | a query of each row over a cache, any spec: sums that a compiler makes loops |
|                      | of; in a compiled step of decoding alone                                     |

Dimensions: B batch, H query heads, K KV heads, Tq and Tk queries and keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.cpu.amx import amx, serves
from model.attention.kernels.flex import block_mask, flex
from model.attention.kernels.scores import Shape, masked_scores, one_query
from model.attention.kernels.tiles import block_size, tiles
from model.attention.rope import alibi_slopes
from model.context import Step
from model.attention.mask import visible

if TYPE_CHECKING:
    from model.mixers.attention import AttentionSpec

Kernel = Literal["auto", "sdpa", "tiles", "amx", "flex", "masked"]

MASK_ELEMENTS = 1 << 22  # the largest piece of a mask, or of scores, that exists at a time
FEWEST = 32  # queries for which tiles are faster than a mask over a cache, and AMX than anything else (measured)
HALF = (torch.bfloat16, torch.float16)


def kernel_name(
    spec: AttentionSpec,
    T: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    contiguous: bool = True,
    in_order: bool = False,
    fused: bool = False,
) -> str:
    """The kernel for T queries, known before it runs so that every figure can carry it.

    UserError where the one that spec.kernel asks for cannot serve: nothing else is taken silently.
    """
    if fused:
        return "one-query"
    shaped = spec.shapes_scores
    masked = "masked-scores" if shaped else "masked"
    if not contiguous:
        if not in_order or not _tiles_serve(spec, T, device, dtype):
            return masked
        return "amx" if spec.kernel == "auto" and _amx_serves(spec, device, dtype) else "tiles"
    slides = spec.window is not None and spec.window < T
    asked = spec.kernel
    if spec.sparse is not None:
        if asked not in ("auto", "masked"):
            raise UserError(f"kernel ({asked}) knows no {spec.sparse.rule} pattern: take masked or auto")
        return masked
    if asked in ("sdpa", "amx", "flex") and shaped:
        raise UserError(f"kernel ({asked}) knows no {shaped[0]}: take tiles, masked or auto")
    if asked == "sdpa" and slides:
        raise UserError(
            f"kernel (sdpa) knows no window ({spec.window} of {T} tokens): take tiles, flex, masked or auto"
        )
    if asked == "flex" and device.type != "cuda":
        raise UserError(f"kernel (flex) needs cuda, not {device.type}: take tiles or auto")
    if asked == "amx" and not _amx_serves(spec, device, dtype):
        here = f"{device.type}, {str(dtype).removeprefix('torch.')} and {spec.head_dim}"
        raise UserError(
            f"kernel (amx) needs a CPU with AMX, a C++ compiler, bfloat16 and head_dim a multiple of 32, not {here}: "
            "take tiles or auto"
        )
    if asked == "auto":
        asked = _fastest(spec, T, slides, device, dtype)
    if asked != "sdpa":
        return masked if asked == "masked" else asked
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
    sink_logit: Tensor | None = None,
    contiguous: bool = False,
    in_order: bool = False,
    context: Tensor | None = None,
    fused: bool = False,
    shared: dict | None = None,
) -> Tensor:
    """(B, H, Tq, D) queries at q_pos over (B, K, Tk, D) keys and values at k_pos, (B or 1, T) each -> (B, H, Tq, D).

    sink_logit (H,) is the learned sink, where spec has one.
    contiguous: queries and keys are one run of positions from 0, so that kernels which know no positions may serve.
    in_order: keys are in order of position and end with the queries' own: any sinks, then one run.
    fused: this is being compiled, and there is one query of each row.
    `context` and `shared` are the step's, where `prepare` left what they need.
    """
    T = k.shape[2]
    match kernel_name(spec, q.shape[2], q.device, q.dtype, contiguous=contiguous, in_order=in_order, fused=fused):
        case "masked":
            return _masked(q, k, v, q_pos, k_pos, spec, context)
        case "masked-scores":
            return _masked_scores(q, k, v, q_pos, k_pos, spec, sink_logit, context)
        case "one-query":
            return one_query(q, k, v, *_seen(q_pos, k_pos, spec, context), _shape(spec, q, sink_logit))
        case "amx":
            return amx(q, k, v, T if spec.window is None else spec.window, spec.n_sink, spec.scale)[0]
        case "tiles":
            window = T if spec.window is None else min(spec.window, T)
            block, slopes = block_size(window, q.dtype), _slopes(spec, q)
            if not contiguous:  # no more scores than of a mask, however long the text is
                row = q.shape[1] // k.shape[1] * min(T, window + block)
                block = min(block, max(FEWEST, 1 << (MASK_ELEMENTS // row).bit_length() - 1))
            return tiles(q, k, v, window, spec.n_sink, block, spec.scale, spec.softcap, slopes, sink_logit)
        case "flex":
            return flex(q, k, v, (shared or {})[_mask_key(spec)], spec.scale)
        case "sdpa-causal-expanded":
            k, v = (x.repeat_interleave(spec.n_head // spec.n_kv_head, dim=1) for x in (k, v))  # (B, H, T, D)
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=gqa)


def _fastest(spec: AttentionSpec, T: int, slides: bool, device: torch.device, dtype: torch.dtype) -> str:
    if spec.shapes_scores:
        return "tiles"
    if T >= FEWEST and _amx_serves(spec, device, dtype):
        return "amx"
    if slides:
        return "flex" if device.type == "cuda" else "tiles"
    if device.type == "cpu" and dtype == torch.bfloat16:  # which the fused kernel's backward multiplies slowly
        return "tiles" if T >= 128 else "sdpa"
    return "sdpa"


def _amx_serves(spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> bool:
    return not spec.shapes_scores and serves(spec.head_dim, device, dtype)


def _tiles_serve(spec: AttentionSpec, T: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether T queries over a cache go in tiles: where asked, or where that measured faster than a mask."""
    if spec.sparse is not None or (spec.alibi and spec.n_sink):  # how far back a sink is, order does not tell
        return False
    if spec.kernel != "auto" or device.type != "cpu":
        return spec.kernel == "tiles"
    return T >= FEWEST if dtype in HALF else spec.window is not None and T >= 128


def prepare(spec: AttentionSpec, step: Step, device: torch.device, dtype: torch.dtype) -> None:
    """Leave in step.shared what a kernel needs beside its tensors: outside of compiled code, once for equal layers."""
    T = step.pos.shape[1]
    if step.contiguous and kernel_name(spec, T, device, dtype) == "flex":
        step.once(_mask_key(spec), lambda: block_mask(T, spec.window, spec.n_sink, device))


def _mask_key(spec: AttentionSpec) -> tuple:
    return "block_mask", spec.window, spec.n_sink


def _masked(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec, context: Tensor | None
) -> Tensor:
    """Any positions, a tile of queries at a time; the query heads of a KV head become rows of one head, uncopied."""
    B, H, Tq, D = q.shape
    K, Tk = k.shape[1:3]
    q = q.view(B, K, H // K, Tq, D)
    rows = max(len(q_pos), 1 if context is None else len(context))
    tile = max(1, MASK_ELEMENTS // (Tk * (H // K) * rows))
    out = []
    for start in range(0, Tq, tile):
        q_tile = q[:, :, :, start : start + tile]  # (B, K, H / K, tile, D)
        mask = visible(q_pos[:, start : start + tile], k_pos, spec, context)  # (B, 1, tile, Tk)
        mask = mask.repeat(1, 1, H // K, 1)  # (B, 1, H / K * tile, Tk)
        y = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k, v, attn_mask=mask, scale=spec.scale)
        out.append(y.view(B, K, H // K, -1, D))
    return torch.cat(out, dim=3).view(B, H, Tq, D)


def _masked_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    context: Tensor | None,
) -> Tensor:
    B, H = q.shape[:2]
    tile = max(1, MASK_ELEMENTS // (B * H * k.shape[2]))
    shape = _shape(spec, q, sink_logit)
    tiles = zip(q.split(tile, dim=2), q_pos.split(tile, dim=1), strict=True)
    out = [masked_scores(q_tile, k, v, *_seen(pos, k_pos, spec, context), shape) for q_tile, pos in tiles]
    return torch.cat(out, dim=2)


def _seen(q_pos: Tensor, k_pos: Tensor, spec: AttentionSpec, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """From each query back to each key, (B or 1, 1, Tq, Tk), and whether it is visible."""
    return (q_pos[:, :, None] - k_pos[:, None])[:, None], visible(q_pos, k_pos, spec, context)


def _shape(spec: AttentionSpec, q: Tensor, sink_logit: Tensor | None) -> Shape:
    scale = spec.scale or q.shape[-1] ** -0.5
    return Shape(scale=scale, softcap=spec.softcap, slopes=_slopes(spec, q), sink_logit=sink_logit)


def _slopes(spec: AttentionSpec, q: Tensor) -> Tensor | None:
    return alibi_slopes(spec.n_head, q.device, q.dtype) if spec.alibi else None
