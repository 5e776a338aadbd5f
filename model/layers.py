"""What stands between the mixers: norms and MLPs.

Dimensions: B batch, T time, C n_embd.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormName = Literal["rmsnorm", "rmsnorm+1", "layernorm"]
MLPName = Literal["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"]
GATED = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}
PLAIN = {"gelu": F.gelu, "gelu-tanh": GATED["geglu"], "relu2": lambda x: F.relu(x).square()}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RMSNormPlusOne(RMSNorm):
    """The same times 1 + weight, multiplied in float32 (Gemma): weights of 0, which may decay, change nothing."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm+1": RMSNormPlusOne}


def make_norm(name: NormName, width: int, *, eps: float, bias: bool) -> nn.Module:
    """A norm over the last dimension; only layernorm may have biases."""
    return nn.LayerNorm(width, eps=eps, bias=bias) if name == "layernorm" else NORMS[name](width, eps)


def to_product_dtype(x: Tensor) -> Tensor:
    """x as autocast would make it for a matrix product: once, where several products share it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through a hidden layer: gelu, squared relu (2109.08668), or gated ones (2002.05202)."""

    def __init__(self, kind: MLPName, width: int, hidden: int, bias: bool):
        super().__init__()
        self.kind = kind
        self.c_gate = nn.Linear(width, hidden, bias=bias) if kind in GATED else None
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is None:
            return self.c_proj(PLAIN[self.kind](self.c_fc(x)))
        return self.c_proj(GATED[self.kind](self.c_gate(x)) * self.c_fc(x))
