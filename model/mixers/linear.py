"""Linear attention (2006.16236): exp(q k) becomes f(q) f(k), so that all the past fits into one matrix per head.

    S_t = S_{t-1} + f(k_t) [v_t, 1]        o_t = f(q_t) S_t, all but the last column divided by the last

Chunks of L tokens: what came before a chunk comes through the state, the chunk itself by its L x L products. A token at
a time that is the recurrence above.

Dimensions: B batch, T time, C n_embd, H heads, D head_dim, N chunks of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu.matmul import Linear
from model.context import PADDING, Step

if TYPE_CHECKING:
    from model.config import ModelConfig

CHUNK = 64
EPS = 1e-6  # beside sums of positive numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """All the numbers of one layer."""

    kind: str = "linear"
    n_embd: int
    n_head: int
    head_dim: int
    bias: bool = False

    @property
    def n_params(self) -> int:
        width = self.n_head * self.head_dim
        return 4 * self.n_embd * width + (3 * width + self.n_embd) * self.bias

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens: projections, and the products of every chunk, a multiply-add counted as two."""
        L, D = min(CHUNK, T), self.head_dim
        chunk = L * L * (D + D + 1) + 2 * L * D * (D + 1)
        return 2 * T * 4 * self.n_embd * self.n_head * D + 2 * -(-T // L) * self.n_head * chunk

    def cache_bytes(self, max_length: int, element_size: int) -> int:
        """Of one sequence, however long: the state, never below float32."""
        return self.n_head * self.head_dim * (self.head_dim + 1) * max(4, element_size)

    def read_bytes(self, start: int, stop: int, element_size: int, *, rolling: bool = True) -> int:
        """Of one sequence: the whole state for each token."""
        return (stop - start) * self.cache_bytes(stop, element_size)

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        return "chunks"

    def prepare(self, step: Step, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: it asks for no more than positions."""


class LinearState:
    """The past of one layer: a matrix per head."""

    max_length = None  # holds a sequence of any length

    def __init__(self, matrix: Tensor):
        self.matrix = matrix  # (B, H, D, D + 1)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.matrix]

    def fork(self, n: int) -> LinearState:
        return LinearState(self.matrix.repeat_interleave(n, dim=0))


class LinearAttention(nn.Module):
    """(B, T, C) -> (B, T, C): every token reads the sum of all before it."""

    def __init__(self, spec: LinearSpec):
        super().__init__()
        self.spec = spec
        width = spec.n_head * spec.head_dim
        self.c_q, self.c_k, self.c_v = (Linear(spec.n_embd, width, bias=spec.bias) for _ in "qkv")
        self.c_proj = Linear(width, spec.n_embd, bias=spec.bias)

    @staticmethod
    def spec_from(config: ModelConfig, kind: str, nth: int) -> LinearSpec:
        return LinearSpec(n_embd=config.n_embd, n_head=config.n_head, head_dim=config.head_width, bias=config.bias)

    def forward(self, x: Tensor, step: Step, cache: LinearState | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (c(x).view(B, T, self.spec.n_head, -1).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(v.dtype, torch.float32)
            q, k, v = F.elu(q.to(wide)) + 1, F.elu(k.to(wide)) + 1, F.pad(v.to(wide), (0, 1), value=1.0)
            if step.padded:
                k = k * (step.pos != PADDING)[:, None, :, None]  # pads add nothing
            state = None
            if cache is not None:
                assert step.past is not None
                state = (
                    cache.matrix.to(wide) * (step.past > 0)[:, None, None, None]
                )  # a row's first token finds nothing
            out, state = chunked(q, k, v, state)  # (B, H, T, D + 1)
            if cache is not None:
                cache.matrix.copy_(state)
            y = out[..., :-1] / (out[..., -1:] + EPS)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2).to(x.dtype))

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> LinearState:
        D, wide = self.spec.head_dim, torch.promote_types(dtype, torch.float32)
        return LinearState(torch.zeros(batch_size, self.spec.n_head, D, D + 1, device=device, dtype=wide))


def chunked(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) features q and k, (B, H, T, E) v, (B, H, D, E) state before -> (B, H, T, E) and the state after."""
    T = q.shape[2]
    L = min(CHUNK, T)
    q, k, v = (F.pad(x, (0, 0, 0, -T % L)).unflatten(2, (-1, L)) for x in (q, k, v))  # (B, H, N, L, D or E)
    sums = (k.transpose(3, 4) @ v).cumsum(dim=2)  # (B, H, N, D, E) of each chunk and all before it
    before = F.pad(sums[:, :, :-1], (0, 0, 0, 0, 1, 0))
    if state is not None:
        before, sums = before + state[:, :, None], sums + state[:, :, None]
    out = q @ before + (q @ k.transpose(3, 4)).tril() @ v  # (B, H, N, L, E)
    return out.flatten(2, 3)[:, :, :T], sums[:, :, -1]
