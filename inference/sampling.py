"""Sampling: the next token from logits, and a stream of tokens from a model.

Dimensions: B prompts or sequences, P the longest prompt's tokens, V vocab_size, n n_samples.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.compiled_decode import compiled
from inference.params import SamplingParams
from model.cache import Cache
from model.gpt import GPT
from model.hash32 import hash32


class Sampler:
    """Draws the next token from logits according to sampling parameters."""

    def __init__(self, params: SamplingParams, *, n_vocab: int | None = None):
        """Ids at or above n_vocab are padding of the vocabulary and are never sampled."""
        self.temperature, self.seed, self.n_vocab = params.temperature, params.seed, n_vocab
        self.top_k = params.top_k
        self.top_p = params.top_p  # 1904.09751
        self.min_p = params.min_p  # 2407.01082
        self.repetition_penalty = params.repetition_penalty  # 1909.05858

    def next(self, logits: Tensor, pos: Tensor, sample: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, V) logits -> (B,) tokens; `seen`, bool (B, V), marks the tokens that repetition_penalty applies to.

        The noise is a function of (seed, sample, position, token), so that the text does not depend on batch, cache or
        prefill chunks; pos and sample are (B,).
        """
        logits = logits[:, : self.n_vocab].float()
        if self.repetition_penalty != 1 and seen is not None:
            lowered = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen[:, : logits.shape[1]], lowered, logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            out = p.cumsum(dim=-1) - p >= self.top_p  # the more likely tokens already reach top_p
            logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
        if self.min_p:
            least = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits)
        return (logits + gumbel(self.seed, sample, pos, logits.shape[-1])).argmax(dim=-1)

    def new_seen(self, batch_size: int, n_vocab: int, device: torch.device) -> Tensor | None:
        """A mask for the tokens that occur in each text, bool (B, V), all False; None without repetition penalty."""
        if self.repetition_penalty == 1:
            return None
        return torch.zeros(batch_size, n_vocab, dtype=torch.bool, device=device)


def gumbel(seed: int, sample: Tensor, pos: Tensor, n: int) -> Tensor:
    """Standard Gumbel noise (B, n), a pure function of (seed, sample, pos, column): sample and pos are (B,)."""
    key = hash32(hash32(torch.full_like(pos, seed & 0xFFFFFFFF) + 0x9E3779B9) + sample)
    key = hash32(key + hash32(pos + 0x85EBCA6B))  # (B,)
    column = torch.arange(n, device=pos.device)
    bits = hash32(hash32(column + 1)[None] ^ key[:, None]) >> 9  # (B, n) 23 bits: exact in float32 with the 0.5
    uniform = (bits.float() + 0.5) / (1 << 23)  # never 0 and never 1
    return -torch.log(-torch.log1p(-uniform))  # large noise comes from small uniforms, where floats are dense


class LogProbs:
    """A `watch` callback of a stream: records log-probabilities (B,) of the sampled tokens, before any filter."""

    last: Tensor

    def __init__(self, n_vocab: int | None = None):
        self._n_vocab = n_vocab

    def __call__(self, logits: Tensor, tokens: Tensor) -> None:
        self.last = logits[:, : self._n_vocab].float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, P), right-padded with zeros, and lengths (B,), or None if all rows have the same length."""
    lengths = [len(row) for row in rows]
    idx = torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in rows], dtype=torch.long, device=device)
    return idx, None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)


def chunks(prompt: Tensor, lengths: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(B, P) prompt in chunks of at most `chunk` columns, each with the number of real tokens in every row."""
    for start, part in zip(range(0, prompt.shape[1], chunk), prompt.split(chunk, dim=1), strict=True):
        yield part, None if lengths is None else (lengths - start).clamp(0, part.shape[1])


@torch.inference_mode()
def prefill(model: GPT, cache: Cache, prompt: Tensor, *, lengths: Tensor | None = None, chunk: int = 512) -> Tensor:
    """Process a (B, P) prompt into the cache, in chunks -> (B, V) logits after each row's last token.

    `lengths` (B,) counts the real tokens of right-padded rows, at least one each.
    """
    logits = torch.empty(0)
    for n, (part, here) in enumerate(chunks(prompt, lengths, chunk)):
        new = model(part, cache=cache, lengths=here, last_only=True)[:, -1]
        logits = new if here is None or n == 0 else torch.where((here > 0)[:, None], new, logits)
    return logits


@torch.inference_mode()
def stream(
    model: GPT,
    cache: Cache | None,
    prompt: Tensor,
    sampler: Sampler,
    *,
    lengths: Tensor | None = None,
    n_samples: int = 1,
    chunk: int = 512,
    seen: Tensor | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Generator[Tensor, None, None]:
    """(B, P) prompt -> an endless stream of (B * n,) tokens: row b * n + s is sample s of prompt b.

    The prompt continues the text in the cache; without a cache the whole text is recomputed for each token. `lengths`
    (B,) counts the real tokens of right-padded rows. `seen`, from `Sampler.new_seen`, is updated in place, so that the
    text can be continued later. `watch` is called with the (B * n, V) logits and the sampled tokens of each step. When
    a token is yielded, the cache holds all tokens before it, but not the token itself.
    """
    B, P = prompt.shape
    sample = torch.arange(n_samples, device=prompt.device).repeat(B)
    n_real = torch.full_like(prompt[:, 0], P) if lengths is None else lengths
    pos = n_real if cache is None else cache.pos + n_real
    if seen is None:
        seen = sampler.new_seen(B, model.config.vocab, prompt.device)
    if seen is not None:
        _note(seen, prompt, lengths)
    if cache is None:
        logits = model(prompt, lengths=lengths, last_only=True)[:, -1]
    else:
        logits = prefill(model, cache, prompt, lengths=lengths, chunk=chunk)
    if n_samples > 1:  # one prefill for all samples
        cache = None if cache is None else cache.fork(n_samples)
        prompt, n_real, pos, logits = (x.repeat_interleave(n_samples, dim=0) for x in (prompt, n_real, pos, logits))
        seen = None if seen is None else seen.repeat_interleave(n_samples, dim=0)
    draw = Sampler.next
    while True:
        token = draw(sampler, logits, pos, sample, seen)
        if watch is not None:
            watch(logits, token)
        yield token
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        if cache is None:
            prompt = F.pad(prompt, (0, 1)).scatter(1, n_real[:, None], token[:, None])  # after each row's last token
            n_real = n_real + 1
            logits = model(prompt, lengths=None if lengths is None else n_real, last_only=True)[:, -1]
        else:
            logits = model(token[:, None], cache=cache)[:, -1]
            if model.compiled_decode is not None:
                draw = compiled(Sampler.next)
        pos = pos + 1


def _note(seen: Tensor, prompt: Tensor, lengths: Tensor | None) -> None:
    """Mark the tokens of a (B, P) prompt in `seen`; padding counts as the row's first token."""
    if lengths is not None:
        real = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        prompt = torch.where(real, prompt, prompt[:, :1])
    seen.scatter_(1, prompt, True)
