"""Positions in attention: rotary embeddings (RoPE) with their context extensions, and ALiBi slopes.

Dimensions: B batch, H query heads, T time, D head_dim, d rotated dimensions of a head.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["none", "linear", "yarn", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Parameters of rotary position embeddings (2104.09864), with an optional context extension by `factor`."""

    base: float
    width: int  # number of leading dimensions of a head that are rotated
    # linear divides all positions (2306.15595); yarn and llama3 only slow frequencies (2309.00071, 2407.21783)
    scaling: Scaling = "none"
    factor: float = 1.0
    trained_length: int = 1  # context length before the extension
    whole_ramp: bool = False  # round the ends of YaRN's ramp to whole dimensions, as transformers does

    def table(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> cos and sin, each float32 (B, 1, T, d / 2)."""
        device = "cpu" if pos.device.type == "mps" else pos.device  # MPS has no float64
        angle = angles(pos[:, None, :, None], self.frequencies(device))  # (B, 1, T, d / 2)
        scale = self.temperature
        return (angle.cos() * scale).float(), (angle.sin() * scale).float()

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """(d / 2,) radians per position, float64."""
        pair = torch.arange(self.width // 2, device=device, dtype=torch.float64)
        trained = self.base ** (-2 * pair / self.width)
        if self.scaling == "yarn":
            low, high = self.ramp
            stretched = ((pair - low) / (high - low)).clamp(0, 1)  # fraction of the extension for each pair
            return trained * (1 - stretched) + trained / self.factor * stretched
        if self.scaling == "llama3":  # unscaled from 4 turns in the trained context on, fully scaled up to 1 turn
            kept = ((self.trained_length * trained / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
            return trained * kept + trained / self.factor * (1 - kept)
        return trained / self.factor

    @property
    def ramp(self) -> tuple[float, float]:
        """YaRN: pairs below `low` (32 or more turns in the trained context) are unscaled, above `high` (1) scaled."""
        low, high = (
            self.width * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
            for turns in (32, 1)
        )
        if self.whole_ramp:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        return low, high if high > low else low + 0.001

    @property
    def temperature(self) -> float:
        """YaRN's attention temperature, a factor on both queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0


def angles(pos: Tensor, frequency: Tensor) -> Tensor:
    """Integer positions times radians per position, accurate at any position (float32 is off by 0.02 at 10**6).

    Computed in float64, or in integers on devices without float64.
    """
    return pos.double() * frequency if pos.device.type != "mps" else angles_in_integers(pos, frequency)


def angles_in_integers(pos: Tensor, frequency: Tensor) -> Tensor:
    """`angles` modulo whole turns, float32, for positions up to 2**32: int64 arithmetic with 2**47 parts per turn."""
    turn = 1 << 47
    parts = lambda turns: (turns % 1 * turn).round().long().to(pos.device)
    low, high = parts(frequency / (2 * math.pi)), parts(frequency * (1 << 16) / (2 * math.pi))
    part = ((pos & 0xFFFF) * low + (pos >> 16) * high) & (turn - 1)  # products stay below 2**63
    return part.float() * (2 * math.pi / turn)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to (B, H, T, D): pairs are elements m and m + d / 2 of the first d dimensions."""
    d = 2 * cos.shape[-1]
    a, b = x[..., :d].chunk(2, dim=-1)
    rest = (x[..., d:],) if d < x.shape[-1] else ()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1).to(x.dtype)


def alibi_slopes(n_head: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ALiBi slopes (H,), subtracted from the scores per token of distance (2108.12409)."""
    n = 1 << (n_head.bit_length() - 1)  # the next lower power of two, then every second slope of the next higher one
    own = torch.arange(1, n + 1, device=device, dtype=dtype) * (8 / n)
    between = (2 * torch.arange(n_head - n, device=device, dtype=dtype) + 1) * (4 / n)
    return torch.exp2(-torch.cat((own, between)))
