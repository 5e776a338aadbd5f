"""Streaming loss on a text far longer than the training context: with the rolling cache, and recomputed per window.

Dimensions: N tokens to predict, B contexts, W window.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.device import Runtime
from model.gpt import GPT


def through_window(model: GPT, window: int, n_sink: int, *, rope_in_cache: bool = False) -> GPT:
    """A model with the same weights and a sliding window in every layer, regardless of its training."""
    return same_weights(model, model.config.sliding(window, n_sink, rope_in_cache=rope_in_cache))


def same_weights(model: GPT, config: ModelConfig) -> GPT:
    """A model with another config and the weights, device and dtype of this one."""
    other = GPT(config).to(model.lm_head.weight)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@torch.inference_mode()
def streamed_losses(
    model: GPT, ids: Tensor, runtime: Runtime, *, chunk: int = 256, cache_dtype: torch.dtype | None = None
) -> Tensor:
    """(N + 1,) ids -> (N,) losses of ids[1:] in nats, each given all tokens before it, with the cache.

    Chunks give the same result as token-by-token decoding in fewer passes: they read the cache before they write it.
    """
    cache = model.new_cache(1, len(ids) - 1, dtype=cache_dtype)
    losses = []
    for idx, targets in zip(ids[None, :-1].split(chunk, dim=1), ids[None, 1:].split(chunk, dim=1), strict=True):
        with runtime.autocast():
            losses.append(model(idx, targets, cache=cache, reduction="none")[0])
    return torch.cat(losses)  # (N,)


@torch.inference_mode()
def recomputed_losses(
    model: GPT, ids: Tensor, at: Tensor, window: int, runtime: Runtime, *, batch_tokens: int = 16_384
) -> Tensor:
    """(N + 1,) ids -> (len(at),) losses of ids[at + 1] in nats, each from only the last `window` tokens, without cache.

    The baseline for streaming (2309.17453): every context begins at position 0 and costs `window` tokens. `at` must be
    ascending.
    """
    early, late = at[at < window - 1], at[at >= window - 1]
    losses = []
    with runtime.autocast():
        if len(early):  # all tokens before them fit into one window: one pass
            n = int(early[-1]) + 1
            losses.append(model(ids[None, :n], ids[None, 1 : n + 1], reduction="none")[0, early])
        back = torch.arange(1 - window, 1, device=ids.device)
        for rows in late.split(max(1, batch_tokens // window)) if len(late) else ():
            contexts, targets = ids[rows[:, None] + back], ids[rows + 1][:, None]  # (B, W), (B, 1)
            losses.append(model(contexts, targets, last_only=True, reduction="none")[:, 0])
    return torch.cat(losses)
