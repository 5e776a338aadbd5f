"""AttentionSpec: all the numbers of one layer's softmax attention, and what they cost."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.attention.mask import count_visible
from model.attention.rope import Rope
from model.attention.sparse import Sparse
from model.cache import kv_bytes, n_slots

KernelName = Literal["auto", "sdpa", "tiles", "amx", "flex", "masked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """All the numbers of one layer's attention. Frozen and hashable: equal layers have equal specs."""

    kind: str = "full"  # full, swa, or the name of a pattern
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int  # width of queries and keys
    v_head_dim: int | None = None  # width of values; None: head_dim
    window: int | None = None  # keys that a query attends to, itself included; None: all
    n_sink: int = 0  # first tokens that stay visible whatever the window
    sparse: Sparse | None = None  # what is visible beside the window
    rope: Rope | None = None  # None: no rotation
    rope_in_cache: bool = False  # keys are stored unrotated and rotated by their place in the cache
    alibi: bool = False  # scores fall linearly with distance, with a slope per head (2108.12409)
    scale: float | None = None  # factor of the scores; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # c: scores become c tanh(scores / c) (2408.00118)
    sink_logit: bool = False  # a learned logit per head in the denominator of the softmax (2508.10925)
    gate: Literal["none", "head", "channel"] = "none"  # sigmoid gate on the output (2505.06708)
    qk_norm: Literal["none", "head", "projection"] = "none"  # normalise each head, or all heads together
    norm: Literal["rmsnorm", "rmsnorm+1"] = "rmsnorm"  # the norm of qk_norm
    norm_eps: float = 1e-6
    bias: Literal["none", "qkv", "all"] = "none"
    kernel: KernelName = "auto"  # for self-attention without a cache

    @property
    def causal(self) -> bool:
        return True

    @property
    def score_mods(self) -> tuple[str, ...]:
        """Modifications of the scores before the softmax, by their names in a config."""
        mods = {"attn_softcap": self.softcap is not None, "alibi": self.alibi, "sink_logit": self.sink_logit}
        return tuple(name for name, on in mods.items() if on)

    @property
    def v_width(self) -> int:
        """Width of the values of a head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def cached_window(self) -> int | None:
        """How many keys the cache must keep; None: all of them, because later queries may attend to any."""
        return self.window if self.sparse is None else None

    @property
    def gate_width(self) -> int:
        return {"none": 0, "head": self.n_head, "channel": self.n_head * self.v_width}[self.gate]

    @property
    def norm_widths(self) -> tuple[int, int]:
        """Of the norms of queries and keys."""
        if self.qk_norm == "projection":
            return self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        return self.head_dim, self.head_dim

    @property
    def projection_widths(self) -> tuple[int, int, int, int]:
        """Of all queries, keys, values and outputs of a token."""
        D, Dv = self.head_dim, self.v_width
        return self.n_head * D, self.n_kv_head * D, self.n_kv_head * Dv, self.n_head * Dv

    @property
    def n_params(self) -> int:
        q, k, v, out = self.projection_widths
        biases = {"none": 0, "qkv": q + k + v, "all": q + k + v + self.n_embd}[self.bias]
        norms = 0 if self.qk_norm == "none" else sum(self.norm_widths)
        return self.n_embd * (q + k + v + out + self.gate_width) + biases + norms + self.n_head * self.sink_logit

    def n_pairs(self, T: int) -> int:
        """Visible (query, key) pairs of a sequence of T tokens: T (T + 1) / 2 without a window."""
        if self.sparse is not None:
            return count_visible(self, T)
        if self.window is None or self.window >= T:
            return T * (T + 1) // 2
        W = self.window
        pairs = W * (W + 1) // 2 + (T - W) * W  # the band
        n_sink = min(self.n_sink, T - W)  # sink j leaves the band of query j + W and is then added back
        return pairs + n_sink * (T - W) - n_sink * (n_sink - 1) // 2

    def forward_flops(self, T: int) -> int:
        """Of a sequence of T tokens: projections and visible pairs; a multiply-add counts as two."""
        projections = self.n_embd * (sum(self.projection_widths) + self.gate_width)
        return 2 * T * projections + 2 * self.n_pairs(T) * self.n_head * (self.head_dim + self.v_width)

    def read_bytes(self, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
        """Bytes of keys and values that one sequence reads to decode its tokens start to stop - 1."""
        spec = self if rolling else replace(self, window=None, sparse=None)
        return (spec.n_pairs(stop) - spec.n_pairs(start)) * self._kv_bytes(dtype)

    def cache_bytes(self, max_length: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one sequence: what new_cache allocates."""
        return n_slots(self.cached_window, self.n_sink, max_length) * self._kv_bytes(dtype)

    def _kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one token."""
        return self.n_kv_head * (kv_bytes(self.head_dim, dtype) + kv_bytes(self.v_width, dtype))
