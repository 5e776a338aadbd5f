"""States of layers: what a mixer keeps of the past between two forward passes.

Softmax attention has a rolling cache of keys and values (model/cache.py); what stands here serves other mixers.

Dimensions: B batch.
"""

from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor

from model.context import ForwardContext


class LayerState(Protocol):
    """What a mixer keeps of the past: its own object, opaque to everything but itself."""

    @property
    def max_length(self) -> int | None:
        """Longest sequence that fits; None: any."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def tensors(self) -> list[Tensor]:
        """All tensors, batch first."""

    def fork(self, n: int) -> Self:
        """A copy with every row n times."""


class RecurrentState:
    """A fixed number of tensors (B, ...), of any shapes and dtypes: a matrix, the tail of a convolution, a token."""

    max_length = None  # a sequence of any length fits

    def __init__(self, **tensors: Tensor):
        self._tensors = tensors

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._tensors.values())

    def tensors(self) -> list[Tensor]:
        return list(self._tensors.values())

    def fork(self, n: int) -> Self:
        return type(self)(**{name: x.repeat_interleave(n, dim=0) for name, x in self._tensors.items()})

    def read(self, name: str, ctx: ForwardContext) -> Tensor:
        """A tensor of the state, 0 in rows that have seen no token: a reset clears no memory."""
        assert ctx.past is not None
        x = self._tensors[name]
        return torch.where((ctx.past > 0).view(-1, *[1] * (x.dim() - 1)), x, 0)

    def write(self, **values: Tensor) -> None:
        """Overwrite tensors of the state, in place."""
        for name, x in values.items():
            self._tensors[name].copy_(x)


class CompositeState:
    """Several states of one layer as one."""

    def __init__(self, parts: Iterable[LayerState]):
        self.parts = list(parts)

    @property
    def max_length(self) -> int | None:
        return min((n for part in self.parts if (n := part.max_length) is not None), default=None)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def tensors(self) -> list[Tensor]:
        return [x for part in self.parts for x in part.tensors()]

    def fork(self, n: int) -> Self:
        return type(self)(part.fork(n) for part in self.parts)
