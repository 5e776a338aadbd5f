"""Windows that differ by head (2501.01039): parts of the heads, each an attention with a window of its own.

The output projection is linear, so the sum over parts equals one projection of all heads together. Each part has a ring
of its own length: what a short window does not need is not kept.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.attention.settings import PER_KIND, AttentionSettings
from model.attention.spec import AttentionSpec
from model.context import ForwardContext
from model.mixers.attention import Attention
from model.mixers.base import Mixer, Place
from model.state import CompositeState, LayerState


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiWindowSpec:
    """The numbers of the parts, which together are one layer's."""

    kind: str = "mswa"
    parts: tuple[AttentionSpec, ...]

    @property
    def causal(self) -> bool:
        return True

    @property
    def n_params(self) -> int:
        return sum(part.n_params for part in self.parts)

    def forward_flops(self, T: int) -> int:
        return sum(part.forward_flops(T) for part in self.parts)

    def cache_bytes(self, max_length: int, dtype: torch.dtype) -> int:
        return sum(part.cache_bytes(max_length, dtype) for part in self.parts)

    def read_bytes(self, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
        return sum(part.read_bytes(start, stop, dtype, rolling=rolling) for part in self.parts)


class MultiWindowAttention(Mixer):
    """(B, T, C) -> (B, T, C): the sum over parts of the heads."""

    spec: MultiWindowSpec
    per_kind = frozenset(PER_KIND)

    def __init__(self, spec: MultiWindowSpec):
        super().__init__(spec)
        self.parts = nn.ModuleList(Attention(part) for part in spec.parts)

    @classmethod
    def spec_from(cls, config: AttentionSettings, place: Place) -> MultiWindowSpec:
        """The heads in equal parts, in the order of head_windows."""
        whole, windows = Attention.spec_from(config, place), config.head_windows
        parts = [
            replace(
                whole,
                kind=place.word,
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

    def forward(self, x: Tensor, ctx: ForwardContext, cache: LayerState | None = None) -> Tensor:
        caches: list[LayerState | None] = [None] * len(self.parts)
        if cache is not None:
            assert isinstance(cache, CompositeState)
            caches[:] = cache.parts
        y = self.parts[0](x, ctx, caches[0])
        for part, own in zip(list(self.parts)[1:], caches[1:], strict=True):
            y = y + part(x, ctx, own)
        return y

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        return "+".join(dict.fromkeys(part.kernel_name(T, device, dtype) for part in self.attentions()))

    def prepare(self, ctx: ForwardContext, device: torch.device, dtype: torch.dtype) -> None:
        for part in self.attentions():
            part.prepare(ctx, device, dtype)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> CompositeState:
        size = (batch_size, max_length, device, dtype)
        return CompositeState(part.new_cache(*size, rolling=rolling) for part in self.attentions())

    def attentions(self) -> list[Attention]:
        return list(self.parts)  # type: ignore[arg-type]  # a ModuleList forgets of what
