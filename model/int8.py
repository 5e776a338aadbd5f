"""Symmetric int8 quantization with one scale per row."""

import torch
from torch import Tensor

LEVELS = 127


def to_int8(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., C) -> int8 (..., C) and scales (..., 1) of scale_dtype: x is about their product.

    The scale is rounded to its dtype first, so that this adds no error to the rounding of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LEVELS).to(scale_dtype)
    steps = wide / scale.to(wide.dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale
