"""Batches from token files. Training rows are a pure function of (seed, step, row); evaluation is one fixed stream.

Legend: B rows, T block_size.
"""

import hashlib
import io
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.constants import IGNORED
from model.errors import UserError

Item = TypeVar("Item")
Placed = TypeVar("Placed")

_HASH_CHUNK = 1 << 20  # tokens


class TokenSource(Protocol):
    """Token ids with random access."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def name(self) -> str: ...

    def read(self, start: int, n: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class TokenArray:
    """Token ids in memory."""

    ids: np.ndarray  # (n_tokens,)
    name: str  # for error messages

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, n: int) -> np.ndarray:
        """Return n ids starting at `start`, (n,)."""
        assert 0 <= start <= start + n <= self.n_tokens, f"{start} + {n} is beyond {self.n_tokens} tokens"
        return self.ids[start : start + n]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A file of token ids. Reads copy from the file: a memory map would count towards the process's memory."""

    path: Path
    dtype: np.dtype
    n_tokens: int
    name: str  # "train" or "val", for error messages

    def read(self, start: int, n: int) -> np.ndarray:
        """Return n ids starting at `start`, (n,) in the file's dtype."""
        assert 0 <= start <= start + n <= self.n_tokens, f"{start} + {n} is beyond {self.n_tokens} tokens"
        size = self.dtype.itemsize
        content = _read_at(self._file.fileno(), n * size, start * size)
        if len(content) != n * size:
            raise UserError(f"{self.path}: truncated while in use; prepare the text again")
        return np.frombuffer(content, dtype=self.dtype)

    @cached_property
    def _file(self) -> io.FileIO:
        return io.FileIO(self.path)


def _read_at(descriptor: int, n: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, n, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, n)


class TrainLoader:
    """Blocks of a split in random order, each once per epoch; every epoch draws a new order and a new offset."""

    def __init__(self, tokens: Tokens, *, block_size: int, global_rows: int, seed: int) -> None:
        if tokens.n_tokens < block_size + 1:
            smaller = f"--model.block_size {_fitting(tokens.n_tokens)} or " if tokens.n_tokens > 1 else ""
            raise UserError(
                f"{tokens.name} split has {tokens.n_tokens} tokens, block_size is {block_size}; use {smaller}more text"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.global_rows = global_rows
        self.seed = seed
        # Use one block fewer than would fit, so that the random offset of each epoch can reach every token.
        self.blocks_per_epoch = max(1, tokens.n_tokens // block_size - 1)
        self._n_offsets = tokens.n_tokens - self.blocks_per_epoch * block_size
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def rows(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Return idx and targets, (B, T) int64 each, for these rows of the step's global batch."""
        n = self.block_size + 1
        blocks = np.stack([self.tokens.read(start, n) for start in self.starts(step, rows)])  # (B, T + 1)
        ids = torch.from_numpy(blocks.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def starts(self, step: int, rows: range) -> list[int]:
        """Return the index in the split of the first token of each of these rows of the step's global batch."""
        return [self._start(step * self.global_rows + row) for row in rows]

    def batches(self, first: int, last: int, micro: int, rows: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield these rows (default: all) of steps first to last - 1, in micro-batches of `micro` rows."""
        rows = range(self.global_rows) if rows is None else rows
        for step in range(first, last):
            for start in range(0, len(rows), micro):
                yield self.rows(step, rows[start : start + micro])

    def epoch(self, step: int) -> float:
        """The number of epochs completed when a step begins."""
        return step * self.global_rows / self.blocks_per_epoch

    def _start(self, row: int) -> int:
        """The first token of a row, where rows are numbered from the start of training."""
        epoch, place = divmod(row, self.blocks_per_epoch)
        offset, order = self._order(epoch)
        return offset + int(order[place]) * self.block_size

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        """An epoch's offset in tokens and its permutation of the blocks; cached, as a batch can span two epochs."""
        if epoch not in self._orders:
            random = np.random.default_rng([self.seed, epoch])
            offset = int(random.integers(self._n_offsets))
            order = random.permutation(np.arange(self.blocks_per_epoch, dtype=np.uint32))
            self._orders = {cached: self._orders[cached] for cached in self._orders if abs(cached - epoch) == 1}
            self._orders[epoch] = (offset, order)
        return self._orders[epoch]


def prefetch(
    items: Iterator[Item], place: Callable[[Item], Placed], *, in_thread: bool
) -> Generator[Placed, None, None]:
    """Yield place(item) for each item; in_thread, the next one is prepared while the caller works on this one."""
    if not in_thread:
        yield from map(place, items)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        make = lambda: [place(item) for item in islice(items, 1)]
        coming = thread.submit(make)
        while made := coming.result():
            coming = thread.submit(make)
            yield made[0]


def eval_batches(
    tokens: TokenSource, *, block_size: int, batch_size: int, max_tokens: int | None = None, stride: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (idx, targets), (B, T) int64, over the split's first max_tokens targets, each exactly once and in order.

    Each window begins `stride` tokens after the previous one (default: block_size, no overlap), and only targets that
    no earlier window has scored count. A short last window is padded with id 0 and ignored targets.
    """
    stride = block_size if stride is None else stride
    n_targets = _n_targets(tokens, max_tokens)
    n_windows = 1 + max(0, -(-(n_targets - block_size) // stride))
    for window in range(0, n_windows, batch_size):
        first = window * stride
        length = (min(batch_size, n_windows - window) - 1) * stride + block_size
        ids = tokens.read(first, min(length, n_targets - first) + 1).astype(np.int64)
        idx = np.zeros(length, dtype=np.int64)
        targets = np.full(length, IGNORED, dtype=np.int64)
        idx[: len(ids) - 1] = ids[:-1]
        targets[: len(ids) - 1] = ids[1:]
        idx, targets = (
            np.lib.stride_tricks.sliding_window_view(x, block_size)[::stride].copy() for x in (idx, targets)
        )
        targets[0 if window else 1 :, : block_size - stride] = IGNORED  # scored in the previous window
        yield torch.from_numpy(idx), torch.from_numpy(targets)


def stream_hash(
    tokens: TokenSource, block_size: int, max_tokens: int | None = None, *, stride: int | None = None
) -> str:
    """Hash of the evaluation stream: equal hashes mean equal targets, each predicted from the same context."""
    n_tokens = _n_targets(tokens, max_tokens) + 1
    overlap = f"{stride} " if stride not in (None, block_size) else ""
    digest = hashlib.sha256(f"{block_size} {overlap}{n_tokens} ".encode())
    for start in range(0, n_tokens, _HASH_CHUNK):
        digest.update(tokens.read(start, min(_HASH_CHUNK, n_tokens - start)).astype("<u4").tobytes())
    return digest.hexdigest()[:16]


def _n_targets(tokens: TokenSource, max_tokens: int | None) -> int:
    if tokens.n_tokens < 2:
        raise UserError(f"{tokens.name} split has {tokens.n_tokens} tokens and must have at least 2; use more text")
    return tokens.n_tokens - 1 if max_tokens is None else min(max_tokens, tokens.n_tokens - 1)


def _fitting(n_tokens: int) -> int:
    """The largest power of two that leaves a target for every position."""
    return 1 << (n_tokens - 1).bit_length() - 1
