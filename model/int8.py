"""Numbers in 8 bits: whole ones, times a scale that a row of them shares."""

import torch
from torch import Tensor

LEVELS = 127


def to_int8(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., C) -> int8 (..., C) and scales (..., 1) of scale_dtype: x is nearly their product.

    The scale is rounded first, so that it costs nothing beside the rounding to whole numbers.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LEVELS).to(scale_dtype)
    steps = wide / scale.to(wide.dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale
