"""The building blocks outside the mixers: linear layers, norms and MLPs.

Dimensions: B batch, T time, C n_embd.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import cpu

NormName = Literal["rmsnorm", "rmsnorm+1", "layernorm"]
MLPName = Literal["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"]
GATED = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}
PLAIN = {"gelu": F.gelu, "gelu-tanh": GATED["geglu"], "relu2": lambda x: F.relu(x).square()}


class Linear(nn.Linear):
    """nn.Linear, (..., I) -> (..., O), by the fastest matmul that the device has (model/cpu)."""

    def forward(self, x: Tensor) -> Tensor:
        return cpu.linear(x, self.weight, self.bias)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x as autocast would cast it for each linear layer that reads it: cast once, where several do."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed and, under autocast, returned in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    keep = torch.is_autocast_enabled(x.device.type)
    y = cpu.rms_norm(x.to(wide), weight.to(wide), eps)
    return y if keep else y.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(RMSNorm):
    """x / rms(x) * (1 + weight), as in Gemma: weight decay pulls the factor towards 1."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight.to(torch.promote_types(x.dtype, torch.float32)), self.eps)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm+1": RMSNormPlusOne}


def make_norm(name: NormName, width: int, *, eps: float, bias: bool) -> nn.Module:
    """A norm over the last dimension; only layernorm may have biases."""
    return nn.LayerNorm(width, eps=eps, bias=bias) if name == "layernorm" else NORMS[name](width, eps)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through a hidden layer: gelu, squared relu (2109.08668), or gated ones (2002.05202)."""

    def __init__(self, kind: MLPName, width: int, hidden: int, bias: bool):
        super().__init__()
        self.kind = kind
        self.c_gate = Linear(width, hidden, bias=bias) if kind in GATED else None
        self.c_fc = Linear(width, hidden, bias=bias)
        self.c_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is None:
            return self.c_proj(PLAIN[self.kind](self.c_fc(x)))
        return self.c_proj(GATED[self.kind](self.c_gate(x)) * self.c_fc(x))
