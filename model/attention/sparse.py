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

from model.hash32 import mix

Rule = Literal["strided", "fixed", "star", "global"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """One pattern's numbers."""

    rule: Rule  # strided and fixed (1904.10509), star (2411.17116), global with random (2004.05150, 2007.14062)
    block: int  # the stride, the block of star, or the block that is drawn at random
    n_summary: int = 0  # fixed: the last columns of each block, which all later queries see
    context: int = 0  # star: queries from here on see all
    tokens: tuple[int, ...] = ()  # global: positions that all see and that see all
    n_random: int = 0  # global: past blocks that each block of queries sees; two draws may be the same
    seed: int = 0  # of the draws: another in each layer

    def sees(self, q: Tensor, k: Tensor, context: Tensor | None = None) -> Tensor:
        """What is visible beside a window, of keys that are not later; any shapes that broadcast.

        context (B or 1,) stands in the place of the pattern's own, for rows as (B, 1, Tq, Tk) has them.
        """
        L, same = self.block, q // self.block == k // self.block
        match self.rule:
            case "strided":
                return (q - k) % L == 0
            case "fixed":
                return same | (k % L >= L - self.n_summary)
            case "star":
                return same | (k < L) | (q >= (self.context if context is None else context[:, None, None, None]))
        seen = [(k == token) | (q == token) for token in self.tokens]  # for tokens and draws
        q_block, k_block = q // L, k // L
        for n in range(self.n_random):
            drawn = mix(mix(self.seed * 8191 + n + q_block * 64)) % (q_block - 1).clamp(min=1)
            seen.append((k_block == drawn) & (q_block > 1))  # the block before is the window's
        return reduce(torch.logical_or, seen)
