"""The tensors that a training process holds from one step to the next."""

from collections.abc import Iterator

from torch import Tensor, nn

from artifacts.sharding import local
from training.optim import Optimizers


def training_tensors(model: nn.Module, optimizers: Optimizers) -> Iterator[Tensor]:
    """Parameters, gradients and optimizer state, as far as this process holds them."""
    for p in model.parameters():
        yield local(p)
        if p.grad is not None:
            yield local(p.grad)
    for state in optimizers.state.values():
        yield from (local(value) for value in state.values() if isinstance(value, Tensor))
