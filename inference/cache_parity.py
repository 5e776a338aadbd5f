"""How far decoding with a cache agrees with computing everything anew.

Dimensions: B texts, P the longest prompt, V vocab_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.sampling import chunks, pad_right
from model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Over all positions of all texts."""

    difference: float  # the largest, of two logits
    largest: float  # logit
    n_same: int  # positions whose likeliest token is the same
    n_positions: int


@torch.inference_mode()
def agreement(
    model: GPT, texts: Sequence[Sequence[int]], n_prompt: Sequence[int], *, rolling: bool = True, chunk: int = 512
) -> Agreement:
    """Texts decoded together, their prompts in chunks and the rest token by token, against each alone and at once."""
    device = model.lm_head.weight.device
    cached = _decoded_together(model, texts, n_prompt, rolling, chunk)
    difference = largest = n_same = 0
    for text, logits in zip(texts, cached, strict=True):
        plain = model(torch.tensor([text], device=device))[0]  # (T, V)
        difference = max(difference, (logits - plain).abs().max().item())
        largest = max(largest, plain.abs().max().item())
        n_same += int((logits.argmax(dim=1) == plain.argmax(dim=1)).sum())
    return Agreement(difference=difference, largest=largest, n_same=n_same, n_positions=sum(map(len, texts)))


def _decoded_together(
    model: GPT, texts: Sequence[Sequence[int]], n_prompt: Sequence[int], rolling: bool, chunk: int
) -> list[Tensor]:
    """The logits of each text, (T, V): what generating a batch computes, ended rows going on with any token."""
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
