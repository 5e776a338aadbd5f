"""A 32-bit hash on tensors: random draws as a pure function of their seed and index."""

from torch import Tensor


def hash32(x: Tensor) -> Tensor:
    """murmur3's finaliser, elementwise, in int64: every bit of the result depends on every bit of x."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
