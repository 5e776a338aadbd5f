"""Step: what one forward pass knows, made once by GPT and read by every layer."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

PADDING = -1  # the position of a padding token: sees padding alone, is seen and stored by nobody
EMPTY = -2  # the position of a cache slot that holds nothing: sees nothing, is seen by nobody


@dataclass(slots=True, kw_only=True)
class Step:
    """Positions of the incoming tokens, and what layers share within this pass."""

    pos: Tensor  # (B or 1, T) absolute positions, or PADDING; one row where all rows have the same
    contiguous: bool = True  # known without reading the device: one run from 0, no cache before it, no padding
    padded: bool = False  # some of pos may be PADDING
    uniform: bool = True  # every row has come to the same position, known without reading the device
    past: Tensor | None = None  # (B or 1,) tokens in the cache before this pass; None: no cache
    added: int | Tensor = 0  # T, or (B,) real tokens of each row
    past_bound: int = 0  # the largest of past at most; equal to it where uniform
    context: Tensor | None = None  # (B or 1,) tokens before the question, for star layers; None: as their config says
    fused: bool = False  # one token of each row, compiled as one piece: products that are summed up need not exist
    shared: dict[Hashable, object] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), computed by the first layer that asks and shared with the others."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]  # type: ignore[return-value]


class AuxiliaryLosses:
    """stub"""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
