"""Softmax attention: MHA (1706.03762), MQA (1911.02150), GQA (2305.13245), SWA (2004.05150, 2310.06825) and kept sinks
(2309.17453) are one module and seven numbers.

    query heads  0 1 2 3 4 5      n_head = 6
    KV heads     0 0 1 1 2 2      n_kv_head = 3: query head h reads KV head h // (n_head // n_kv_head)

Dimensions: B batch, T time, C n_embd, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.attend import attend
from model.cache import KVCache, n_slots
from model.in_cache import rotate_by_place
from model.layers import RMSNorm, rope_table, rotate
from model.step import Step

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """All the numbers of one layer's attention."""

    kind: str = "full"  # "full" or "swa": what the layer does, which window says too
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    window: int | None = None  # keys that a query sees, itself included; None: all
    n_sink: int = 0  # first tokens that stay visible whatever the window
    rope_base: float | None = None  # None: no rotation
    rope_in_cache: bool = False  # keys are kept as they are and rotated by place, see model.in_cache
    qk_norm: bool = False
    norm_eps: float = 1e-6
    bias: bool = False
    kernel: str = "auto"  # of self-attention without a cache, see model.attend

    @property
    def n_params(self) -> int:
        qkv = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        out = self.n_head * self.head_dim
        weights = self.n_embd * (qkv + out) + 2 * self.head_dim * self.qk_norm
        return weights + (qkv + self.n_embd) * self.bias

    def n_pairs(self, T: int) -> int:
        """Visible (query, key) pairs of one sequence of T tokens: T (T + 1) / 2 when nothing slides."""
        if self.window is None or self.window >= T:
            return T * (T + 1) // 2
        W, pairs = self.window, 0
        pairs += W * (W + 1) // 2 + (T - W) * W  # the band
        n_sink = min(self.n_sink, T - W)  # a sink j leaves the band of query j + W and is then added back
        return pairs + n_sink * (T - W) - n_sink * (n_sink - 1) // 2

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens: projections and visible pairs, a multiply-add counted as two."""
        projections = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        return 2 * T * projections + 4 * self.n_pairs(T) * self.n_head * self.head_dim

    def read_bytes(self, start: int, stop: int, element_size: int, *, rolling: bool = True) -> int:
        """Of one sequence: keys and values read to decode its tokens start to stop - 1."""
        spec = self if rolling else replace(self, window=None)
        return 2 * (spec.n_pairs(stop) - spec.n_pairs(start)) * self.n_kv_head * self.head_dim * element_size

    def cache_bytes(self, max_length: int, element_size: int) -> int:
        """Of one sequence: keys and values of every slot that new_cache allocates."""
        return 2 * n_slots(self.window, self.n_sink, max_length) * self.n_kv_head * self.head_dim * element_size


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C): every query over the keys that `spec` lets it see."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.spec = spec
        H, K, D = spec.n_head, spec.n_kv_head, spec.head_dim
        self.c_q = nn.Linear(spec.n_embd, H * D, bias=spec.bias)  # apart: Muon treats each matrix as one
        self.c_k = nn.Linear(spec.n_embd, K * D, bias=spec.bias)
        self.c_v = nn.Linear(spec.n_embd, K * D, bias=spec.bias)
        self.c_proj = nn.Linear(H * D, spec.n_embd, bias=spec.bias)
        self.q_norm = RMSNorm(D, spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, spec.norm_eps) if spec.qk_norm else nn.Identity()

    @staticmethod
    def spec_from(config: ModelConfig, kind: str) -> AttentionSpec:
        """One layer's numbers: `kind` is its word in the pattern."""
        window = config.window_everywhere or (config.window if kind == "swa" else None)
        base = config.of_kind("rope_base", kind) if config.of_kind("position", kind) == "rope" else None
        return AttentionSpec(
            kind="full" if window is None else "swa",
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=config.head_width,
            window=window,
            n_sink=0 if window is None else config.n_sink,
            rope_base=base,
            rope_in_cache=config.rope_in_cache and base is not None and window is not None,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            bias=config.bias,
            kernel=config.kernel,
        )

    def forward(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        D = self.spec.head_dim
        q, k, v = (c(x).view(B, T, -1, D).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))  # (B, H or K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if (base := self.spec.rope_base) is not None and not self.spec.rope_in_cache:
            cos, sin = step.once(("rope", D, base), lambda: rope_table(step.pos, D, base))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # stored rotated: a slot's order does not matter
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotations are float32
        k_pos = step.pos
        if cache is not None:
            k, v, k_pos = cache.update(k, v, step)  # (B, K, keys, D)
        contiguous = step.contiguous and not self.spec.rope_in_cache
        if self.spec.rope_in_cache:
            q, k, v = rotate_by_place(q, k, v, k_pos, step, self.spec)  # maybe of 2 D
        y = attend(q, k, v, step.pos, k_pos, self.spec, contiguous=contiguous, shared=step.shared)[..., :D]
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> KVCache:
        """Room for what a sequence of max_length tokens needs; longer ones too, where the window is all it needs."""
        spec = self.spec
        S = n_slots(spec.window if rolling else None, spec.n_sink, max_length)
        k, v = (torch.zeros(batch_size, spec.n_kv_head, S, spec.head_dim, device=device, dtype=dtype) for _ in "kv")
        endless = rolling and spec.window is not None and spec.n_sink + spec.window == S
        return KVCache(k, v, n_sink=spec.n_sink, max_length=None if endless else max_length)
