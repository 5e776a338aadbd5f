"""Loss over a fixed stream of tokens, and by position within the context."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.constants import IGNORED
from model.device import Runtime
from model.gpt import GPT
from training.distributed import UNDISTRIBUTED, DistributedContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Averages over tokens, so that they do not depend on the batch shape."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # all nats over the bytes of the targets' text; end-of-text has none
    n_tokens: int


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    runtime: Runtime,
    distributed: DistributedContext = UNDISTRIBUTED,
    *,
    observe: Callable[[Tensor, Tensor], None] = lambda losses, targets: None,
) -> Evaluation:
    """Mean loss over the targets of (idx, targets) batches, each (B, T), which are split over the processes.

    Targets of -100 are ignored. `observe` is called with the losses and targets of each batch, both (B, T).
    """
    was_training = model.training
    model.eval()
    nats, n_tokens, n_bytes = 0.0, 0.0, 0.0
    for idx, targets in distributed.split_batches(batches, IGNORED):
        with runtime.autocast():
            losses = model(idx.to(runtime.device), targets.to(runtime.device), reduction="none")  # (B, T)
        observe(losses, targets)
        real = targets[targets != IGNORED]
        nats += losses.double().sum().item()
        n_tokens += real.numel()
        n_bytes += int(token_bytes[real.numpy()].sum())
    model.train(was_training)
    nats, n_tokens, n_bytes = distributed.all_reduce_sum([nats, n_tokens, n_bytes])
    loss = nats / n_tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(1, n_bytes),
        n_tokens=int(n_tokens),
    )


class LossByPosition:
    """Sum of nats and number of targets at each position of the context."""

    def __init__(self, T: int):
        self.nats = torch.zeros(T, dtype=torch.float64)
        self.n_targets = torch.zeros(T, dtype=torch.long)

    def add(self, losses: Tensor, targets: Tensor) -> None:
        """Add (B, T) losses, which are 0 for targets of -100."""
        self.nats += losses.double().sum(0).cpu()
        self.n_targets += (targets != IGNORED).sum(0)

    def tail(self, share: float) -> float:
        """Mean loss over the last `share` of the positions; nan if no target was there."""
        last = slice(len(self.nats) - max(1, round(share * len(self.nats))), None)
        return (self.nats[last].sum() / self.n_targets[last].sum()).item()

    def curve(self, per_octave: int = 4) -> tuple[list[float], list[float]]:
        """Positions and mean losses in log-spaced bins; position 1 is a prediction from one token.

        A bin's position is the mean position of its targets; bins without targets are left out.
        """
        T = len(self.nats)
        edges = {round(2 ** (i / per_octave)) for i in range(per_octave * T.bit_length())}
        widest = 2 ** (0.5 / per_octave)  # the last bin is at least half as wide as the others
        bins = [*sorted(edge for edge in edges if edge * widest <= T), T + 1]
        position = torch.arange(1, T + 1) * self.n_targets
        positions, losses = [], []
        for start, end in pairwise(bins):
            inside = slice(start - 1, end - 1)
            if n := self.n_targets[inside].sum().item():
                positions.append(position[inside].sum().item() / n)
                losses.append(self.nats[inside].sum().item() / n)
        return positions, losses
