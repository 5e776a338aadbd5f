"""What stands between the mixers: norms, MLPs, rotary positions.

Dimensions: B batch, T time, C n_embd, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(name: str, width: int, *, eps: float, bias: bool) -> nn.Module:
    """ "rmsnorm" or "layernorm" over the last dimension."""
    return RMSNorm(width, eps) if name == "rmsnorm" else nn.LayerNorm(width, eps=eps, bias=bias)


def to_product_dtype(x: Tensor) -> Tensor:
    """x as autocast would make it for a matrix product: once, where several products share it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through a hidden layer: gelu, squared relu (2109.08668), or swiglu (2002.05202)."""

    def __init__(self, kind: str, width: int, hidden: int, bias: bool):
        super().__init__()
        self.kind = kind
        self.c_gate = nn.Linear(width, hidden, bias=bias) if kind == "swiglu" else None
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if self.c_gate is not None:
            hidden = F.silu(self.c_gate(x)) * hidden
        else:
            hidden = F.gelu(hidden) if self.kind == "gelu" else F.relu(hidden).square()
        return self.c_proj(hidden)


def rope_table(pos: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(B, T) positions -> cos and sin, each float32 (B, 1, T, D / 2) (2104.09864)."""
    device = "cpu" if pos.device.type == "mps" else pos.device  # where there is float64
    frequency = base ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle = angles(pos[:, None, :, None], frequency)  # (B, 1, T, D / 2)
    return angle.cos().float(), angle.sin().float()


def angles(pos: Tensor, frequency: Tensor) -> Tensor:
    """Integer positions times float64 radians per position, right at any position: float32 is off by 0.02 at 10**6.

    In float64, or in integers on a device that has none.
    """
    return pos.double() * frequency if pos.device.type != "mps" else angles_in_integers(pos, frequency)


def angles_in_integers(pos: Tensor, frequency: Tensor) -> Tensor:
    """The same but for whole turns, float32, for positions up to 2**32: a turn is 2**47 parts, kept in int64."""
    turn = 1 << 47
    parts = lambda turns: (turns % 1 * turn).round().long().to(pos.device)
    low, high = parts(frequency / (2 * math.pi)), parts(frequency * (1 << 16) / (2 * math.pi))
    part = ((pos & 0xFFFF) * low + (pos >> 16) * high) & (turn - 1)  # no product is above 2**63
    return part.float() * (2 * math.pi / turn)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, T, D) by its positions: the pairs are elements m and m + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
