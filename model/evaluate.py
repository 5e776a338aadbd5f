"""Loss over a fixed stream of tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.device import Runtime
from model.gpt import GPT
from model.loss import IGNORED
from model.parallel import ALONE, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Weighted by token, so that no batch shape changes it."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # all nats over the bytes of the text that the targets spell; end-of-text spells none
    n_tokens: int


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    runtime: Runtime,
    world: World = ALONE,
) -> Evaluation:
    """Mean loss over the targets of (idx, targets) batches, each (B, T), shared out among the processes.

    Targets of -100 count as nothing.
    """
    was_training = model.training
    model.eval()
    nats, n_tokens, n_bytes = 0.0, 0.0, 0.0
    for idx, targets in world.share(batches, IGNORED):
        with runtime.autocast():
            losses = model(idx.to(runtime.device), targets.to(runtime.device), reduction="none")  # (B, T)
        real = targets[targets != IGNORED]
        nats += losses.double().sum().item()
        n_tokens += real.numel()
        n_bytes += int(token_bytes[real.numpy()].sum())
    model.train(was_training)
    nats, n_tokens, n_bytes = world.sum([nats, n_tokens, n_bytes])
    loss = nats / n_tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(1, n_bytes),
        n_tokens=int(n_tokens),
    )
