"""Integers mixed so that every bit depends on every other: randomness that is a function of what it is for."""

from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche (murmur3's finaliser), in int64."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
