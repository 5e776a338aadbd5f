"""Windows that differ by head (2501.01039): parts of the heads, each an attention with a window of its own.

The output projection is linear, so the sum over parts equals one projection of all heads together. Each part has a ring
of its own length: what a short window does not need is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.cache import KVCache
from model.mixers.attention import Attention, AttentionSpec
from model.context import Step

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiWindowSpec:
    """The numbers of the parts, which together are one layer's."""

    kind: str = "mswa"
    parts: tuple[AttentionSpec, ...]

    @property
    def n_params(self) -> int:
        return sum(part.n_params for part in self.parts)

    def forward_flops(self, T: int) -> int:
        return sum(part.forward_flops(T) for part in self.parts)

    def cache_bytes(self, max_length: int, element_size: int) -> int:
        return sum(part.cache_bytes(max_length, element_size) for part in self.parts)

    def read_bytes(self, start: int, stop: int, element_size: int, *, rolling: bool = True) -> int:
        return sum(part.read_bytes(start, stop, element_size, rolling=rolling) for part in self.parts)

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        return "+".join(dict.fromkeys(part.kernel_name(T, device, dtype) for part in self.parts))

    def prepare(self, step: Step, device: torch.device, dtype: torch.dtype) -> None:
        for part in self.parts:
            part.prepare(step, device, dtype)


class MultiWindowCache:
    """The rings of the parts."""

    def __init__(self, parts: Iterable[KVCache]):
        self.parts = list(parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def max_length(self) -> int | None:
        return min((n for part in self.parts if (n := part.max_length) is not None), default=None)

    def tensors(self) -> list[Tensor]:
        return [x for part in self.parts for x in part.tensors()]

    def fork(self, n: int) -> MultiWindowCache:
        return MultiWindowCache(part.fork(n) for part in self.parts)


class MultiWindowAttention(nn.Module):
    """(B, T, C) -> (B, T, C): the sum over parts of the heads."""

    def __init__(self, spec: MultiWindowSpec):
        super().__init__()
        self.spec = spec
        self.parts = nn.ModuleList(Attention(part) for part in spec.parts)

    @staticmethod
    def spec_from(config: ModelConfig, kind: str, nth: int) -> MultiWindowSpec:
        """The heads in equal parts, in the order of head_windows."""
        whole, windows = Attention.spec_from(config, kind, nth), config.head_windows
        parts = [
            replace(
                whole,
                kind=kind,
                n_head=whole.n_head // len(windows),
                n_kv_head=whole.n_kv_head // len(windows),
                window=config.window_everywhere or window,
                n_sink=config.n_sink,
            )
            for window in windows
        ]
        if whole.bias == "all":  # the output has one bias, not one for each part
            parts[1:] = [replace(part, bias="qkv") for part in parts[1:]]
        return MultiWindowSpec(parts=tuple(parts))

    def forward(self, x: Tensor, step: Step, cache: MultiWindowCache | None = None) -> Tensor:
        caches = [None] * len(self.parts) if cache is None else cache.parts
        y = self.parts[0](x, step, caches[0])
        for part, own in zip(list(self.parts)[1:], caches[1:], strict=True):
            y = y + part(x, step, own)
        return y

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> MultiWindowCache:
        rooms = (part.new_cache(batch_size, max_length, device, dtype, rolling=rolling) for part in self.parts)  # type: ignore[operator]
        return MultiWindowCache(rooms)
