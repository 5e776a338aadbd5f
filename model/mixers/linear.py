"""Linear attention (2006.16236): exp(q k) becomes f(q) f(k), so that the whole past fits into one matrix per head.

    S_t = S_{t-1} + f(k_t) [v_t, 1]        o_t = f(q_t) S_t, all but the last column divided by the last

Computed in chunks of L tokens: earlier tokens enter through the state, those of the chunk through L x L scores. With
one token at a time that is the recurrence above.

Dimensions: B batch, T time, C n_embd, H heads, D head_dim, N chunks of L tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.settings import AttentionSettings
from model.context import PADDING, ForwardContext
from model.layers import Linear
from model.mixers.base import Mixer, Place
from model.state import LayerState, RecurrentState

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

    @property
    def causal(self) -> bool:
        return True

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens: projections and the matmuls of every chunk; a multiply-add counts as two."""
        L, D = min(CHUNK, T), self.head_dim
        chunk = L * L * (D + D + 1) + 2 * L * D * (D + 1)
        return 2 * T * 4 * self.n_embd * self.n_head * D + 2 * -(-T // L) * self.n_head * chunk

    def cache_bytes(self, max_length: int, dtype: torch.dtype) -> int:
        """Of one sequence of any length: the state, in float32 at least."""
        return self.n_head * self.head_dim * (self.head_dim + 1) * max(4, dtype.itemsize)

    def read_bytes(self, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
        """Of one sequence: the whole state for each token."""
        return (stop - start) * self.cache_bytes(stop, dtype)


class LinearAttention(Mixer):
    """(B, T, C) -> (B, T, C): every token reads the sum over itself and all before it."""

    spec: LinearSpec

    def __init__(self, spec: LinearSpec):
        super().__init__(spec)
        width = spec.n_head * spec.head_dim
        self.c_q, self.c_k, self.c_v = (Linear(spec.n_embd, width, bias=spec.bias) for _ in "qkv")
        self.c_proj = Linear(width, spec.n_embd, bias=spec.bias)

    @classmethod
    def spec_from(cls, config: AttentionSettings, place: Place) -> LinearSpec:
        return LinearSpec(n_embd=config.n_embd, n_head=config.n_head, head_dim=config.head_width, bias=config.bias)

    def forward(self, x: Tensor, ctx: ForwardContext, cache: LayerState | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (c(x).view(B, T, self.spec.n_head, -1).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(v.dtype, torch.float32)
            q, k, v = F.elu(q.to(wide)) + 1, F.elu(k.to(wide)) + 1, F.pad(v.to(wide), (0, 1), value=1.0)
            if ctx.padded:
                k = k * (ctx.pos != PADDING)[:, None, :, None]  # pads add nothing
            state = None
            if cache is not None:
                assert isinstance(cache, RecurrentState)
                state = cache.read("matrix", ctx).to(wide)
            out, state = chunked(q, k, v, state)  # (B, H, T, D + 1)
            if cache is not None:
                cache.write(matrix=state)
            y = out[..., :-1] / (out[..., -1:] + EPS)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2).to(x.dtype))

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> RecurrentState:
        D, wide = self.spec.head_dim, torch.promote_types(dtype, torch.float32)
        return RecurrentState(matrix=torch.zeros(batch_size, self.spec.n_head, D, D + 1, device=device, dtype=wide))


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
