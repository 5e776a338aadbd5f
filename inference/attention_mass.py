"""How much attention goes to the first tokens, read from the running network.

Dimensions: B batch, T time, H query heads, K KV heads, D head_dim.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.mixers.attention import Attention


@torch.no_grad()
def attention_to_first(model: GPT, batches: Iterable[Tensor], k: int) -> dict[int, float]:
    """Mean probability that queries behind the first k tokens give to those k, by index of the attention layer.

    Exact, by whatever kernel runs: each layer runs once more on values that are 1 at the first k tokens and 0 behind
    them, so that what comes out of its attention is the probability. batches: (B, T) ids, T above k.
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
    """A hook that runs an attention layer once more, on values that point at the first k tokens."""

    def point(_: nn.Module, args: tuple, v: Tensor) -> Tensor:
        first = torch.arange(v.shape[1], device=v.device) < k
        return first[None, :, None].to(v.dtype).expand_as(v)  # (B, T, K * D)

    def read(_: nn.Module, args: tuple) -> None:
        probability = args[0][:, k:]  # (B, T - k, H * D): every channel of a head is that head's
        found.append(probability.float().mean(dim=-1).flatten())

    def hook(mixer: Attention, args: tuple, output: Tensor) -> None:
        inner = mixer.c_v.register_forward_hook(point), mixer.c_proj.register_forward_pre_hook(read)
        try:
            mixer.forward(*args)  # past its own hooks
        finally:
            for handle in inner:
                handle.remove()

    return hook
