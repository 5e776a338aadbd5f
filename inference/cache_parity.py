"""Cache parity: how far logits decoded with a cache differ from those of one pass over the whole text.

Dimensions: B texts, P the longest prompt, V vocab_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.sampling import chunks, pad_right
from model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Difference of cached and uncached logits, over all positions of all texts."""

    difference: float  # largest absolute difference of a logit; nan if any logit is
    largest: float  # largest absolute logit
    n_same: int  # positions with the same most likely token
    n_positions: int


@torch.inference_mode()
def cache_parity(
    model: GPT, texts: Sequence[Sequence[int]], n_prompt: Sequence[int], *, rolling: bool = True, chunk: int = 512
) -> Parity:
    """Compare texts decoded as one batch, prompts in chunks and the rest token by token, with each text in one pass."""
    device = model.lm_head.weight.device
    cached = _decoded_together(model, texts, n_prompt, rolling, chunk)
    differences, sizes, n_same = [], [], 0
    for text, logits in zip(texts, cached, strict=True):
        plain = model(torch.tensor([text], device=device))[0]  # (T, V)
        differences.append((logits - plain).abs().max())
        sizes.append(plain.abs().max())
        n_same += int((logits.argmax(dim=1) == plain.argmax(dim=1)).sum())
    difference, largest = (torch.stack(x).max().item() for x in (differences, sizes))  # Python's max would drop a nan
    return Parity(difference=difference, largest=largest, n_same=n_same, n_positions=sum(map(len, texts)))


def _decoded_together(
    model: GPT, texts: Sequence[Sequence[int]], n_prompt: Sequence[int], rolling: bool, chunk: int
) -> list[Tensor]:
    """The logits of each text, (T, V), computed as in batched generation; shorter rows are padded."""
    device = model.lm_head.weight.device
    prompts, lengths = pad_right([text[:n] for text, n in zip(texts, n_prompt, strict=True)], device)
    rests, _ = pad_right([text[n:] for text, n in zip(texts, n_prompt, strict=True)], device)
    cache = model.new_cache(len(texts), prompts.shape[1] + rests.shape[1], rolling=rolling)
    read = [model(part, cache=cache, lengths=here) for part, here in chunks(prompts, lengths, chunk)]
    of_prompts = torch.cat(read, dim=1)  # (B, P, V)
    made = [model(column, cache=cache) for column in rests.split(1, dim=1) if column.shape[1]]
    of_rests = torch.cat(made, dim=1) if made else of_prompts[:, :0]
    return [
        torch.cat((of_prompts[b, :n], of_rests[b, : len(text) - n]))
        for b, (text, n) in enumerate(zip(texts, n_prompt, strict=True))
    ]
