"""ForwardContext: what one forward pass knows, made once by GPT and read by every layer."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

PADDING = -1  # position of a padding token: it attends to padding alone, and is never stored or attended to
EMPTY = -2  # position of a cache slot that holds nothing


@dataclass(slots=True, kw_only=True)
class ForwardContext:
    """Positions of the incoming tokens, and what layers share within one forward pass.

    Dimensions: B batch, T incoming tokens. A batch dimension of 1 means that all rows have the same values.
    """

    pos: Tensor  # (B or 1, T) absolute positions, or PADDING
    contiguous: bool = True  # positions are 0 to T - 1, without padding and without a cache before them
    padded: bool = False  # some of pos may be PADDING
    uniform: bool = True  # all rows are at the same position
    past: Tensor | None = None  # (B or 1,) tokens in the cache before this pass; None: no cache
    added: int | Tensor = 0  # T, or (B,) the real tokens of each row
    past_bound: int = 0  # upper bound of past, known without reading the device; equal to it where uniform
    star_context: Tensor | None = None  # (B or 1,) context length of star layers; None: as their config says
    compiled_decode: bool = False  # inside compiled code, one token of each row
    shared: dict[Hashable, object] = field(default_factory=dict)  # what `memo` has computed
    passed: dict[str, Tensor] = field(default_factory=dict)  # tensors that earlier layers left for later ones
    losses: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses of the layer that runs now

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), computed by the first layer that asks and reused by the others."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]  # type: ignore[return-value]

    def add_loss(self, name: str, value: Tensor) -> None:
        """A scalar that training minimises beside the cross-entropy, already multiplied by its coefficient.

        Values of one name add up over layers. They are reported apart from the cross-entropy, under this name.
        """
        self.losses[name] = self.losses[name] + value if name in self.losses else value


class AuxiliaryLosses:
    """The auxiliary losses of one forward pass by name, detached and summed over layers: GPT.forward fills it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
