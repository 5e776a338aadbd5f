"""torch's fused causal attention (SDPA), without a window.

Dimensions: B batch, H query heads, K KV heads, T tokens, D head_dim, Dv width of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def reads_gqa(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's fused kernel supports GQA directly, without copying KV heads."""
    return device.type == "cuda" and dtype in HALF


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """(B, H, T, D) over (B, K, T, D) keys and (B, K, T, Dv) values -> (B, H, T, Dv).

    Fused kernels require equal widths: if D and Dv differ, the narrower is padded with zeros.
    """
    if k.shape[1] != q.shape[1] and not reads_gqa(q.device, q.dtype):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, H, T, D or Dv)
    D, Dv = q.shape[-1], v.shape[-1]
    if Dv != D:
        scale, width = D**-0.5 if scale is None else scale, max(D, Dv)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return y if Dv == D else y[..., :Dv]
