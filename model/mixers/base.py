"""The contract of a mixer: what the network asks of every layer that mixes tokens, and of its numbers.

A mixer is one file: a spec (frozen numbers), a module, and, where it has settings of its own, a Section for
[model.WORD]. One line in the table of model/mixers/__init__.py makes it known. docs/add-a-mixer.md shows how.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from model.attention.settings import AttentionSettings
from model.context import ForwardContext
from model.section import Section
from model.state import LayerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a layer stands in the network."""

    word: str  # its word in the pattern
    nth: int  # layers of the same word before it
    index: int  # layers before it
    n_layer: int


class MixerSpec(Protocol):
    """The numbers of one layer, frozen and hashable: equal layers have equal specs."""

    @property
    def kind(self) -> str:
        """The name of this kind of layer in tables and logs; mostly its word in the pattern."""

    @property
    def causal(self) -> bool:
        """False where outputs depend on later tokens: reports mark such a layer, and it cannot generate."""

    @property
    def n_params(self) -> int: ...

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens; a multiply-add counts as two."""

    def cache_bytes(self, max_length: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state: what new_cache allocates for a cache of this dtype."""

    def read_bytes(self, start: int, stop: int, dtype: torch.dtype, *, rolling: bool = True) -> int:
        """Bytes of state that one sequence reads to decode its tokens start to stop - 1."""


class Mixer(nn.Module, ABC):
    """(B, T, C) -> (B, T, C), mixing tokens. State lives in the cache, never on the module."""

    Settings: ClassVar[type[Section] | None] = None  # the class of [model.WORD], where it has settings of its own
    per_kind: ClassVar[frozenset[str]] = frozenset()  # settings that may be tables by kind of layer, which it reads

    def __init__(self, spec: MixerSpec):
        super().__init__()
        self.spec = spec

    @classmethod
    @abstractmethod
    def spec_from(cls, config: AttentionSettings, place: Place) -> MixerSpec:
        """The numbers of one layer. config.own(place.word) are the settings of [model.WORD]."""

    @abstractmethod
    def forward(self, x: Tensor, ctx: ForwardContext, cache: LayerState | None = None) -> Tensor:
        """cache None: training. With a cache the tokens continue what it has seen; nothing else differs."""

    @abstractmethod
    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype, *, rolling: bool = True
    ) -> LayerState:
        """Empty state for sequences of up to max_length tokens. rolling False: windows keep every token too."""

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        """What training on T tokens runs on. UserError where the kernel asked for cannot serve."""
        return "torch"

    def prepare(self, ctx: ForwardContext, device: torch.device, dtype: torch.dtype) -> None:
        """Leave in ctx.shared what compiled code cannot make. Called once per distinct spec, before the layers run."""

    def init_weights(self) -> None:
        """Initial values that differ from the network's: called after it has initialised every matrix."""

    def adamw_parameters(self) -> Iterable[nn.Parameter]:
        """Matrices that Muon must not orthogonalise, and that do not decay: AdamW takes them."""
        return ()


def last_tokens(tail: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
    """(B, n, C) last tokens before x, and (B, T, C) x -> the last n real tokens of each row, (B, n, C).

    The tail of a causal convolution or a token shift, right for padded rows too, and for rows without a new token.
    """
    both, n = torch.cat((tail, x), dim=1), tail.shape[1]
    if not ctx.padded:
        return both[:, -n:]
    assert isinstance(ctx.added, Tensor), "padded rows have lengths"
    index = ctx.added[:, None] + torch.arange(n, device=x.device)  # (B, n)
    return both.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
