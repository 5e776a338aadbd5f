"""Patterns of who sees whom that are no window: all by positions, all causal, for `model.attention.mask` to ask.

strided, stride 3      fixed, stride 3, 1 summary   star, blocks of 3, context 8   window 2, global 1
x                      x                            x                              x
x x                    x x                          x x                            x x
x x x                  x x x                        x x x                          . x x
x x x x                . . x x                      x x x x                        . x x x
. x x x x              . . x x x                    x x x x x                      . x . x x
. . x x x x            . . x x x x                  x x x x x x                    . x . . x x
x . . x x x x          . . x . . x x                x x x . . . x                  . x . . . x x
. x . . x x x x        . . x . . x x x              x x x . . . x x                . x . . . . x x
. . x . . x x x x      . . x . . x x x x            x x x x x x x x x              . x . . . . . x x
"""

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from model.hash32 import hash32

Rule = Literal["strided", "fixed", "star", "global"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """The numbers of one pattern."""

    rule: Rule  # strided and fixed (1904.10509), star (2411.17116), global with random (2004.05150, 2007.14062)
    block: int  # the stride, or the block size of star and of random blocks
    n_summary: int = 0  # fixed: last columns of each block that all later queries attend to
    context: int = 0  # star: queries from this position on attend to all keys
    tokens: tuple[int, ...] = ()  # global: positions that attend to all and that all attend to
    n_random: int = 0  # global: past blocks drawn for each block of queries; two draws may coincide
    seed: int = 0  # of the draws: each layer has another

    def mask_mod(self, q: Tensor, k: Tensor, star_context: Tensor | None = None) -> Tensor:
        """Whether q attends to k beside the window, for keys that are not later; any shapes that broadcast.

        star_context (B or 1,) replaces the pattern's own context, for q and k that broadcast to (B, 1, Tq, Tk).
        """
        L, same = self.block, q // self.block == k // self.block
        match self.rule:
            case "strided":
                return (q - k) % L == 0
            case "fixed":
                return same | (k % L >= L - self.n_summary)
            case "star":
                return (
                    same
                    | (k < L)
                    | (q >= (self.context if star_context is None else star_context[:, None, None, None]))
                )
        seen = [(k == token) | (q == token) for token in self.tokens]  # for tokens and draws
        q_block, k_block = q // L, k // L
        for n in range(self.n_random):
            drawn = hash32(hash32(self.seed * 8191 + n + q_block * 64)) % (q_block - 1).clamp(min=1)
            seen.append((k_block == drawn) & (q_block > 1))  # the block before is the window's
        return reduce(torch.logical_or, seen)
