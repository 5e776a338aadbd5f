"""Softmax attention: MHA (1706.03762), MQA (1911.02150), GQA (2305.13245), sliding windows (2004.05150, 2310.06825) and
attention sinks (2309.17453) are one module and a record of numbers; so are published gates, norms and score mods.

    query heads  0 1 2 3 4 5      n_head = 6
    KV heads     0 0 1 1 2 2      n_kv_head = 3: query head h reads KV head h // (n_head // n_kv_head)

Dimensions: B batch, T time, C n_embd, H query heads, K KV heads, D head_dim, Dv width of values.
"""

import torch
from torch import Tensor, nn

from model.attention import dispatch
from model.attention.in_cache import rotate_by_place
from model.attention.rope import rotate
from model.attention.settings import PER_KIND, AttentionSettings
from model.attention.spec import AttentionSpec
from model.cache import KVCache, empty_kv, n_slots
from model.context import ForwardContext
from model.layers import NORMS, Linear
from model.mixers.base import Mixer, Place
from model.state import LayerState


class Attention(Mixer):
    """(B, T, C) -> (B, T, C): every query attends to the keys that `spec` makes visible."""

    spec: AttentionSpec
    per_kind = frozenset(PER_KIND)

    def __init__(self, spec: AttentionSpec):
        super().__init__(spec)
        C, H = spec.n_embd, spec.n_head
        q_width, k_width, v_width, out_width = spec.projection_widths
        qkv_bias, all_bias = spec.bias != "none", spec.bias == "all"
        self.c_q = Linear(C, q_width, bias=qkv_bias)  # three matrices: Muon orthogonalises each one
        self.c_k = Linear(C, k_width, bias=qkv_bias)
        self.c_v = Linear(C, v_width, bias=qkv_bias)
        self.c_proj = Linear(out_width, C, bias=all_bias)
        self.c_gate = Linear(C, spec.gate_width, bias=False) if spec.gate_width else None
        self.sink_logit = nn.Parameter(torch.zeros(H)) if spec.sink_logit else None
        if spec.qk_norm != "none":
            self.q_norm, self.k_norm = (NORMS[spec.norm](width, spec.norm_eps) for width in spec.norm_widths)

    @classmethod
    def spec_from(cls, config: AttentionSettings, place: Place) -> AttentionSpec:
        kind, nth = place.word, place.nth
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
            alibi=config.per_kind("position", kind) == "alibi",
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

    def forward(self, x: Tensor, ctx: ForwardContext, cache: LayerState | None = None) -> Tensor:
        B, T, _ = x.shape
        spec = self.spec
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)  # (B, T, H D), (B, T, K D), (B, T, K Dv)
        if spec.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(B, T, n, -1) for y, n in ((q, spec.n_head), (k, spec.n_kv_head), (v, spec.n_kv_head)))
        if spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if (rope := spec.rope) is not None and not spec.rope_in_cache:
            cos, sin = ctx.memo(rope, lambda: rope.table(ctx.pos))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # stored rotated: the order of slots does not matter
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotations are float32
        k_pos = ctx.pos
        if cache is not None:
            assert isinstance(cache, KVCache)
            k, v, k_pos = cache.update(k, v, ctx)  # (B, K, keys, D or Dv)
        if spec.rope_in_cache:
            q, k, v = rotate_by_place(q, k, v, k_pos, ctx, spec)  # maybe 2 D wide
        y = dispatch.attend(q, k, v, k_pos, spec, ctx, sink_logit=self.sink_logit)
        y = y[..., : spec.v_width].transpose(1, 2)  # (B, T, H, Dv)
        if self.c_gate is not None:
            y = y * torch.sigmoid(self.c_gate(x)).view(B, T, spec.n_head, -1)
        return self.c_proj(y.flatten(2))

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        return dispatch.kernel_name(self.spec, dispatch.Call(T, device, dtype))

    def prepare(self, ctx: ForwardContext, device: torch.device, dtype: torch.dtype) -> None:
        dispatch.prepare(self.spec, ctx, device, dtype)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> KVCache:
        """Slots for sequences of max_length tokens; for longer ones too, where the window is all a layer needs."""
        spec = self.spec
        S = n_slots(spec.cached_window if rolling else None, spec.n_sink, max_length)
        endless = rolling and spec.cached_window is not None and spec.n_sink + spec.cached_window == S
        shape, limit = (batch_size, spec.n_kv_head, S), None if endless else max_length
        return empty_kv(shape, (spec.head_dim, spec.v_width), device, dtype, n_sink=spec.n_sink, max_length=limit)
