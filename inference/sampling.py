"""From logits to text: the next token, and a stream of them.

Dimensions: B prompts or sequences, P the longest prompt's tokens, V vocab_size, n n_samples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.compiled_decode import compiled
from model.cache import Cache
from model.gpt import GPT
from model.hash32 import hash32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How the next token is drawn. temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach this probability (1904.09751)
    min_p: float | None = None  # only those at least this part as likely as the likeliest (2407.01082)
    repetition_penalty: float = 1.0  # above 1: tokens that the text already has become less likely (1909.05858)
    seed: int = 0
    n_vocab: int | None = None  # ids from here on only pad the vocabulary and are never drawn

    def next(self, logits: Tensor, pos: Tensor, sample: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, V) logits -> (B,) tokens; `seen`, bool (B, V), is what repetition_penalty asks for.

        The noise is a function of (seed, sample, position) and the token alone, so that neither the batch nor the cache
        nor how the prompt was cut changes the text; pos and sample are (B,).
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
            out = p.cumsum(dim=-1) - p >= self.top_p  # the likelier ones reach it without this one
            logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
        if self.min_p:
            least = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits)
        return (logits + gumbel(self.seed, sample, pos, logits.shape[-1])).argmax(dim=-1)

    def new_seen(self, batch_size: int, n_vocab: int, device: torch.device) -> Tensor | None:
        """Bool (B, V), the tokens of a text that has none yet; None where nothing asks for it."""
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
    return -torch.log(-torch.log1p(-uniform))  # the likeliest to win come from small numbers, which are finest


class LogProbs:
    """A `watch` of a stream: the log-probability that the model itself gives the tokens drawn last, (B,)."""

    last: Tensor

    def __init__(self, n_vocab: int | None = None):
        self._n_vocab = n_vocab

    def __call__(self, logits: Tensor, tokens: Tensor) -> None:
        self.last = logits[:, : self._n_vocab].float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, P) with zeros behind the shorter rows, and lengths (B,): None where all rows are equally long."""
    lengths = [len(row) for row in rows]
    idx = torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in rows], dtype=torch.long, device=device)
    return idx, None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)


def chunks(prompt: Tensor, lengths: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(B, P) prompt in pieces of at most `chunk` columns, and how many real tokens each row has in each."""
    for start, part in zip(range(0, prompt.shape[1], chunk), prompt.split(chunk, dim=1), strict=True):
        yield part, None if lengths is None else (lengths - start).clamp(0, part.shape[1])


@torch.inference_mode()
def prefill(model: GPT, cache: Cache, prompt: Tensor, *, lengths: Tensor | None = None, chunk: int = 512) -> Tensor:
    """(B, P) prompt into the cache, a chunk at a time -> (B, V) logits after each row's last token.

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
) -> Iterator[Tensor]:
    """(B, P) prompt -> its continuations without end, (B * n,) tokens at a time: row b * n + s is sample s of prompt b.

    The prompt goes on from what the cache holds; no cache: everything is computed anew. `lengths` (B,) counts the real
    tokens of right-padded rows. `seen`, a `Sampler.new_seen`, is kept up to date for a text that goes on later. `watch`
    is given the (B * n, V) logits and the tokens of each draw. When a token arrives, the cache has all before it.
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
    if n_samples > 1:  # one prefill serves all
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
            prompt = F.pad(prompt, (0, 1)).scatter(1, n_real[:, None], token[:, None])  # behind each row's last token
            n_real = n_real + 1
            logits = model(prompt, lengths=None if lengths is None else n_real, last_only=True)[:, -1]
        else:
            logits = model(token[:, None], cache=cache)[:, -1]
            if model.compiled_decode:
                draw = compiled(Sampler.next)
        pos = pos + 1


def _note(seen: Tensor, prompt: Tensor, lengths: Tensor | None) -> None:
    """Set what a (B, P) prompt has in `seen`; pads stand for their row's first token."""
    if lengths is not None:
        real = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        prompt = torch.where(real, prompt, prompt[:, :1])
    seen.scatter_(1, prompt, True)
