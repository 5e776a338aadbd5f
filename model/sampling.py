"""From logits to text: the next token, and a stream of them.

Dimensions: B sequences, V vocab_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import Cache
from model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How the next token is drawn. temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach this probability (1904.09751)
    seed: int = 0
    n_vocab: int | None = None  # ids from here on only pad the vocabulary and are never drawn

    def next(self, logits: Tensor, pos: Tensor, sample: Tensor) -> Tensor:
        """(B, V) logits -> (B,) tokens.

        The noise is a function of (seed, sample, position) and the token alone, so that neither the batch nor the cache
        nor how the prompt was cut changes the text; pos and sample are (B,).
        """
        logits = logits[:, : self.n_vocab].float()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            out = p.cumsum(dim=-1) - p >= self.top_p  # the likelier ones reach it without this one
            logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
        # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits)
        return (logits + gumbel(self.seed, sample, pos, logits.shape[-1])).argmax(dim=-1)


def gumbel(seed: int, sample: Tensor, pos: Tensor, n: int) -> Tensor:
    """Standard Gumbel noise (B, n), a pure function of (seed, sample, pos, column): sample and pos are (B,)."""
    key = _mix(_mix(torch.full_like(pos, seed & 0xFFFFFFFF) + 0x9E3779B9) + sample)
    key = _mix(key + _mix(pos + 0x85EBCA6B))  # (B,)
    column = torch.arange(n, device=pos.device)
    bits = _mix(_mix(column + 1)[None] ^ key[:, None]) >> 9  # (B, n) 23 bits: with the half, float32 holds them exactly
    uniform = (bits.float() + 0.5) / (1 << 23)  # never 0 and never 1
    return -torch.log(-torch.log1p(-uniform))  # the likeliest to win come from small numbers, which are finest


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche (murmur3's finaliser), in int64."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


@torch.inference_mode()
def prefill(model: GPT, cache: Cache, prompt: Tensor, *, chunk: int = 512) -> Tensor:
    """(B, P) prompt into the cache, a chunk at a time -> (B, V) logits of the next token."""
    for part in prompt.split(chunk, dim=1):
        logits = model(part, cache=cache, last_only=True)
    return logits[:, -1]


@torch.inference_mode()
def stream(model: GPT, cache: Cache | None, prompt: Tensor, sampler: Sampler, *, chunk: int = 512) -> Iterator[Tensor]:
    """(B, P) prompt -> its continuation without end, (B,) tokens at a time. No cache: everything is computed anew."""
    sample = torch.arange(len(prompt), device=prompt.device)
    pos = torch.full_like(sample, prompt.shape[1])
    logits = model(prompt, last_only=True)[:, -1] if cache is None else prefill(model, cache, prompt, chunk=chunk)
    while True:
        token = sampler.next(logits, pos, sample)
        yield token
        if cache is None:
            prompt = torch.cat((prompt, token[:, None]), dim=1)
            logits = model(prompt, last_only=True)[:, -1]
        else:
            logits = model(token[:, None], cache=cache)[:, -1]
        pos = pos + 1
