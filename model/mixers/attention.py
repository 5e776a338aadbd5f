"""Softmax attention: MHA (1706.03762), MQA (1911.02150), GQA (2305.13245), SWA (2004.05150, 2310.06825) and kept sinks
(2309.17453) are one module and a record of numbers; so are the published ways of shaping scores and outputs.

    query heads  0 1 2 3 4 5      n_head = 6
    KV heads     0 0 1 1 2 2      n_kv_head = 3: query head h reads KV head h // (n_head // n_kv_head)

Dimensions: B batch, T time, C n_embd, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from model.attention.dispatch import attend, kernel_name, prepare
from model.cache import KVCache, empty_kv, kv_bytes, n_slots
from model.attention.in_cache import rotate_by_place
from model.layers import NORMS
from model.attention.rope import Rope, rotate
from model.cpu.matmul import Linear
from model.attention.sparse import Sparse
from model.context import Step
from model.attention.mask import n_visible

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
    sparse: Sparse | None = None  # what is visible beside the window
    rope: Rope | None = None  # None: no rotation
    rope_in_cache: bool = False  # keys are kept as they are and rotated by place, see model.attention.in_cache
    alibi: bool = False  # scores fall with distance, by a slope of each head's own (2108.12409)
    scale: float | None = None  # what scores are multiplied by; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # c: scores are c tanh(scores / c) (2408.00118)
    sink_logit: bool = False  # a learned logit by head in the softmax's denominator (2508.10925)
    gate: Literal["none", "head", "channel"] = "none"  # sigmoid gate of the output (2505.06708)
    qk_norm: Literal["none", "head", "projection"] = "none"  # over a head's width, or all heads' together
    norm: Literal["rmsnorm", "rmsnorm+1"] = "rmsnorm"  # which one that is
    norm_eps: float = 1e-6
    bias: Literal["none", "qkv", "all"] = "none"
    kernel: str = "auto"  # of self-attention without a cache, see model.attention.dispatch

    @property
    def shapes_scores(self) -> tuple[str, ...]:
        """What fused kernels do not know, by its name in a config."""
        shapes = {"attn_softcap": self.softcap is not None, "alibi": self.alibi, "sink_logit": self.sink_logit}
        return tuple(name for name, there in shapes.items() if there)

    @property
    def kept(self) -> int | None:
        """How far back keys are needed; None: for ever, as where any later query may see them."""
        return self.window if self.sparse is None else None

    @property
    def gate_width(self) -> int:
        return {"none": 0, "head": self.n_head, "channel": self.n_head * self.head_dim}[self.gate]

    @property
    def norm_widths(self) -> tuple[int, int]:
        """Of queries and keys."""
        together = self.qk_norm == "projection"
        return tuple(self.head_dim * (n if together else 1) for n in (self.n_head, self.n_kv_head))  # type: ignore[return-value]

    @property
    def n_params(self) -> int:
        qkv = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        out = self.n_head * self.head_dim
        biases = {"none": 0, "qkv": qkv, "all": qkv + self.n_embd}[self.bias]
        norms = 0 if self.qk_norm == "none" else sum(self.norm_widths)
        return self.n_embd * (qkv + out + self.gate_width) + biases + norms + self.n_head * self.sink_logit

    def n_pairs(self, T: int) -> int:
        """Visible (query, key) pairs of one sequence of T tokens: T (T + 1) / 2 when nothing slides."""
        if self.sparse is not None:
            return n_visible(self, T)
        if self.window is None or self.window >= T:
            return T * (T + 1) // 2
        W, pairs = self.window, 0
        pairs += W * (W + 1) // 2 + (T - W) * W  # the band
        n_sink = min(self.n_sink, T - W)  # a sink j leaves the band of query j + W and is then added back
        return pairs + n_sink * (T - W) - n_sink * (n_sink - 1) // 2

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens: projections and visible pairs, a multiply-add counted as two."""
        projections = self.n_embd * (self.head_dim * (2 * self.n_head + 2 * self.n_kv_head) + self.gate_width)
        return 2 * T * projections + 4 * self.n_pairs(T) * self.n_head * self.head_dim

    def read_bytes(self, start: int, stop: int, element_size: int, *, rolling: bool = True) -> int:
        """Of one sequence: keys and values read to decode its tokens start to stop - 1."""
        spec = self if rolling else replace(self, window=None, sparse=None)
        return 2 * (spec.n_pairs(stop) - spec.n_pairs(start)) * self.n_kv_head * kv_bytes(self.head_dim, element_size)

    def cache_bytes(self, max_length: int, element_size: int) -> int:
        """Of one sequence: keys and values of every slot that new_cache allocates."""
        return 2 * n_slots(self.kept, self.n_sink, max_length) * self.n_kv_head * kv_bytes(self.head_dim, element_size)

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        return kernel_name(self, T, device, dtype)

    def prepare(self, step: Step, device: torch.device, dtype: torch.dtype) -> None:
        prepare(self, step, device, dtype)


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C): every query over the keys that `spec` lets it see."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.spec = spec
        C, H, K, D = spec.n_embd, spec.n_head, spec.n_kv_head, spec.head_dim
        qkv_bias, all_bias = spec.bias != "none", spec.bias == "all"
        self.c_q = Linear(C, H * D, bias=qkv_bias)  # apart: Muon treats each matrix as one
        self.c_k = Linear(C, K * D, bias=qkv_bias)
        self.c_v = Linear(C, K * D, bias=qkv_bias)
        self.c_proj = Linear(H * D, C, bias=all_bias)
        self.c_gate = Linear(C, spec.gate_width, bias=False) if spec.gate_width else None
        self.sink_logit = nn.Parameter(torch.zeros(H)) if spec.sink_logit else None
        if spec.qk_norm != "none":
            self.q_norm, self.k_norm = (NORMS[spec.norm](width, spec.norm_eps) for width in spec.norm_widths)

    @staticmethod
    def spec_from(config: ModelConfig, kind: str, nth: int) -> AttentionSpec:
        """One layer's numbers: `kind` is its word in the pattern, of which nth come before it."""
        window = config.window_everywhere or config.nth_window(kind, nth)
        sparse = None if config.window_everywhere else config.sparse(kind, nth)
        rope = config.rope(kind)
        return AttentionSpec(
            kind=kind if sparse else "full" if window is None else "swa",
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=config.head_width,
            window=window,
            n_sink=config.n_sink if window is not None and (kind == "swa" or not sparse) else 0,
            sparse=sparse,
            rope=rope,
            rope_in_cache=config.rope_in_cache and rope is not None and window is not None and sparse is None,
            alibi=config.of_kind("position", kind) == "alibi",
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            sink_logit=config.sink_logit,
            gate=config.attn_gate,
            qk_norm=config.qk_norm_over if config.qk_norm else "none",
            norm="rmsnorm+1" if config.norm == "rmsnorm+1" else "rmsnorm",
            norm_eps=config.norm_eps,
            bias="all" if config.bias else config.attn_bias or "none",
            kernel=config.kernel,
        )

    def forward(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        spec = self.spec
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)  # (B, T, H D), (B, T, K D) twice
        if spec.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(B, T, -1, spec.head_dim) for y in (q, k, v))  # (B, T, H or K, D)
        if spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if (rope := spec.rope) is not None and not spec.rope_in_cache:
            cos, sin = step.once(rope, lambda: rope.table(step.pos))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # stored rotated: a slot's order does not matter
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotations are float32
        k_pos = step.pos
        if cache is not None:
            k, v, k_pos = cache.update(k, v, step)  # (B, K, keys, D)
        if spec.rope_in_cache:
            q, k, v = rotate_by_place(q, k, v, k_pos, step, spec)  # maybe of 2 D
        y = attend(
            *(q, k, v, step.pos, k_pos, spec),
            sink_logit=self.sink_logit,
            contiguous=step.contiguous and not spec.rope_in_cache,
            in_order=cache is not None and step.uniform and T > 1 and not spec.rope_in_cache,
            context=step.context,
            fused=step.fused,
            shared=step.shared,
        )
        y = y[..., : spec.head_dim].transpose(1, 2)  # (B, T, H, D)
        if self.c_gate is not None:
            y = y * torch.sigmoid(self.c_gate(x)).view(B, T, spec.n_head, -1)
        return self.c_proj(y.flatten(2))

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> KVCache:
        """Room for what a sequence of max_length tokens needs; longer ones too, where the window is all it needs."""
        spec = self.spec
        S = n_slots(spec.kept if rolling else None, spec.n_sink, max_length)
        endless = rolling and spec.kept is not None and spec.n_sink + spec.kept == S
        shape, limit = (batch_size, spec.n_kv_head, S, spec.head_dim), None if endless else max_length
        return empty_kv(shape, device, dtype, n_sink=spec.n_sink, max_length=limit)
