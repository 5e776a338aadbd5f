"""Attention mass: the probability that attention assigns to the first tokens, measured in the running network.

Dimensions: B batch, T time, H query heads, K KV heads, D head_dim.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.mixers.attention import Attention


@torch.no_grad()
def attention_mass(model: GPT, batches: Iterable[Tensor], k: int) -> dict[int, float]:
    """Mean attention probability on the first k tokens, over all later queries, by index of the attention layer.

    Exact with any kernel: each layer runs a second time with values that are 1 at the first k tokens and 0 after them,
    so that the output of attention is the probability. batches: (B, T) ids, T above k.
    """
    found: dict[int, list[Tensor]] = {i: [] for i, block in enumerate(model.h) if isinstance(block.mixer, Attention)}
    hooks = [model.h[i].mixer.register_forward_hook(_again(k, layer)) for i, layer in found.items()]  # type: ignore[union-attr]
    try:
        for idx in batches:
            model(idx, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {i: torch.cat(layer).mean().item() for i, layer in found.items()}


def _again(k: int, found: list[Tensor]) -> Callable[[Attention, tuple, Tensor], None]:
    """A hook that runs an attention layer a second time, with values that mark the first k tokens."""

    def point(_: nn.Module, args: tuple, v: Tensor) -> Tensor:
        first = torch.arange(v.shape[1], device=v.device) < k
        return first[None, :, None].to(v.dtype).expand_as(v)  # (B, T, K * D)

    def read(_: nn.Module, args: tuple) -> None:
        probability = args[0][:, k:]  # (B, T - k, H * D): every channel of a head is that head's
        found.append(probability.float().mean(dim=-1).flatten())

    def hook(mixer: Attention, args: tuple, output: Tensor) -> None:
        inner = mixer.c_v.register_forward_hook(point), mixer.c_proj.register_forward_pre_hook(read)
        try:
            mixer.forward(*args)  # bypasses its own hooks
        finally:
            for handle in inner:
                handle.remove()

    return hook
