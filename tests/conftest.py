"""What the tests share: small networks whose sizes all differ, and ways of feeding them in chunks."""

import os
from collections.abc import Sequence

import torch
from hypothesis import settings
from torch import Tensor

from model.cache import Cache
from model.config import ModelConfig
from model.gpt import GPT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # networks this small gain nothing from more, and lose much where the machine is busy
settings.register_profile("sash", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("long", settings.get_profile("sash"), derandomize=False, max_examples=500)
settings.load_profile("sash")

VOCAB = 31
SMALL = {
    "vocab_size": VOCAB,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 6,
    "n_kv_head": 2,
    "head_dim": 8,
    "n_embd": 20,
    "mlp_width": 28,
}


def tiny_config(**overrides) -> ModelConfig:
    """A network of a millisecond: H=6, K=2, D=8, C=20, 28 hidden, 31 words, 2 layers."""
    return ModelConfig(**(SMALL | overrides))


def tiny_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    """Its weights are large and nothing is 0 or 1, so that every part moves the logits."""
    torch.manual_seed(seed)
    model = GPT(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cut(sizes: Sequence[int], total: int) -> list[int]:
    """The sizes as far as the total, the last one cut, or the rest added."""
    out: list[int] = []
    while (rest := total - sum(out)) > 0:
        out.append(min(sizes[len(out)], rest) if len(out) < len(sizes) else rest)
    return out


def tensors_of(cache: Cache) -> list[Tensor]:
    """All tensors that the layers' states hold."""
    return [x for state in cache.layers for x in vars(state).values() if isinstance(x, Tensor)]


@torch.no_grad()
def logits_in_chunks(model: GPT, idx: Tensor, sizes: Sequence[int], cache: Cache | None = None) -> Tensor:
    """(B, T) -> (B, T, V), fed to the cache in chunks of these sizes, as `cut` makes them add up."""
    cache = model.new_cache(len(idx), idx.shape[1]) if cache is None else cache
    return torch.cat([model(chunk, cache=cache) for chunk in idx.split(cut(sizes, idx.shape[1]), dim=1)], dim=1)


@torch.no_grad()
def logits_ragged(
    model: GPT, rows: Sequence[Tensor], lengths: Sequence[Sequence[int]], cache: Cache, *, junk_seed: int = 2
) -> list[list[Tensor]]:
    """Feed chunk after chunk of right-padded rows, lengths[chunk][row] real tokens each; logits of each row's tokens.

    Pads are random tokens and every chunk has one column of them more than it needs.
    """
    out: list[list[Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for n, counts in enumerate(lengths):
        idx = random_tokens(len(rows), max(counts) + 1, seed=junk_seed + n)
        for b, count in enumerate(counts):
            idx[b, :count] = rows[b][done[b] : done[b] + count]
        logits = model(idx, cache=cache, lengths=torch.tensor(counts))
        assert logits.isfinite().all(), "a padded position is not finite"
        for b, count in enumerate(counts):
            out[b].append(logits[b, :count])
            done[b] += count
    return out
