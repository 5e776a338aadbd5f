"""The buffers of `tiles`: allocated once per call and reused from tile to tile.

Dimensions: B batch, K KV heads, R query heads per KV head, T time, D head_dim, b block, S sinks including the learned
one, L keys of the band, N = B K.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries start..stop over a band of keys low..stop, preceded by n_sink sinks and, before them, a learned sink."""

    start: int
    stop: int
    rows: slice  # rows of q with these queries, which differ from start..stop with a cache
    low: int
    end: int  # end of the padded band; no query attends to keys from stop on
    n_sink: int
    learned: bool

    @property
    def n_before(self) -> int:
        """Columns before the band: the learned sink and the sinks."""
        return self.n_sink + self.learned

    def by_head(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, R b, ...) -> (B, K, R, b, ...), where `like` is (K, R)."""
        return x.view(-1, *like.shape, self.stop - self.start, *x.shape[2:])

    def distances(self, like: Tensor) -> Tensor:
        """Distances (b, S + L) from each query back to each key; 0 for the learned sink."""
        pos = torch.arange(self.end, device=like.device)
        back = pos[self.start : self.stop, None] - torch.cat((pos[: self.n_sink], pos[self.low :]))
        return (F.pad(back, (1, 0)) if self.learned else back).to(like.dtype)


class Workspace:
    """Named buffers reused by every tile: page faults of new ones would cost as much time as the matmuls."""

    def __init__(self, like: Tensor):
        self.like = like
        self.packs = like.element_size() < 4  # CPU matmuls copy strided half-precision operands
        self._flat: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of this name with this shape, uninitialised."""
        views = self._views.setdefault(name, {})
        if shape not in views:
            n = math.prod(shape)
            flat = self._flat.setdefault(name, self.like.new_empty(0, dtype=dtype))
            if flat.numel() < n:
                flat.resize_(n)  # in place, so that existing views do not keep the old memory alive
            views[shape] = flat[:n].view(shape)
        return views[shape]

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batched matmul (N, n, i) @ (N, i, m) -> (N, n, m) into a buffer."""
        return torch.bmm(a, b, out=self.take(name, len(a), a.shape[1], b.shape[2]))

    def queries(self, name: str, tile: Tile, x: Tensor, scale: float = 1.0) -> Tensor:
        """The tile's rows of (B, K, R, T, D) -> (N, R b, D), N = B K: the query heads of a KV head share its keys."""
        rows = x[:, :, :, tile.rows]
        if scale != 1 or self.packs:
            rows = torch.mul(rows, scale, out=self.take(name, *rows.shape))
        return rows.reshape(rows.shape[0] * rows.shape[1], -1, rows.shape[4])

    def put(self, x: Tensor, tile: Tile, rows: Tensor, scale: float = 1.0) -> None:
        """Write (N, R b, D) to the rows that `queries` reads."""
        place = x[:, :, :, tile.rows]
        torch.mul(rows.view(place.shape), scale, out=place)

    def keys(self, name: str, tile: Tile, x: Tensor) -> Tensor:
        """The tile's rows of (B, K, T, D) -> (N, S + L, D): the sinks, then the band."""
        band = x[:, :, tile.low : tile.end]
        n_band, n_here = tile.end - tile.low, band.shape[2]
        if not (self.packs or tile.n_before) and n_here == n_band:
            return band.flatten(0, 1)
        kept = self.take(name, *x.shape[:2], tile.n_before + n_band, x.shape[3])
        if tile.learned:
            kept[:, :, 0] = 0
        if tile.n_sink:
            kept[:, :, tile.learned : tile.n_before].copy_(x[:, :, : tile.n_sink])
        kept[:, :, tile.n_before :][:, :, :n_here].copy_(band)
        if n_here < n_band:
            kept[:, :, tile.n_before + n_here :] = 0
        return kept.flatten(0, 1)


class KVGradAccumulator:
    """Gradients of keys or values, summed over tiles in float32.

    In half precision, only keys that later tiles still contribute to have a float32 sum, in a ring buffer; completed
    keys free their slots for the next tile.
    """

    def __init__(self, name: str, out: Tensor, n_open: int, n_sink: int, workspace: Workspace):
        self.out, self.low = out, out.shape[2]  # (B, K, T, D); sums exist from key `low` on
        dtype = torch.promote_types(out.dtype, torch.float32)
        self.exact = out.dtype == dtype
        self.sums = out if self.exact else workspace.take(name, *out.shape[:2], n_open, out.shape[3], dtype=dtype)
        self.sinks = out.new_zeros(*out.shape[:2], min(n_sink, out.shape[2]), out.shape[3], dtype=dtype)

    def add(self, tile: Tile, x: Tensor) -> None:
        """Add x (N, S + L, D) to the sums of the tile's keys."""
        x = x.unflatten(0, self.out.shape[:2])
        if tile.n_sink:
            self.sinks[:, :, : tile.n_sink] += x[:, :, tile.learned : tile.n_before]
        done = max(self.low, tile.start)  # no later tile contributes to keys from start on
        for start, stop in ((self.low, done), (done, tile.stop)):  # separately, to limit float32 temporaries
            for sums, keys in self._places(start, stop):
                sums += self._of(tile, x, keys)
        if not self.exact:
            self._keep(done, tile.stop)
            if tile.start < done:
                keys = slice(tile.start, done)
                self.out[:, :, keys].copy_(self._of(tile, x, keys))
        for sums, keys in self._places(tile.low, self.low if self.exact else min(self.low, tile.start)):
            sums.copy_(self._of(tile, x, keys))
        self.low = tile.low

    def finish(self, first: int) -> None:
        """Write the sums of keys before the first query, and add the gradients of the sinks."""
        if not self.exact:
            self._keep(self.low, first)
        self.out[:, :, : self.sinks.shape[2]] += self.sinks

    def _keep(self, start: int, stop: int) -> None:
        for sums, keys in self._places(start, stop):
            self.out[:, :, keys].copy_(sums)

    def _places(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """The parts of the ring buffer that hold the sums of these keys: two if they wrap around."""
        size = self.sums.shape[2]
        while start < stop:
            at = start % size
            n = min(stop - start, size - at)
            yield self.sums[:, :, at : at + n], slice(start, start + n)
            start += n

    @staticmethod
    def _of(tile: Tile, x: Tensor, keys: slice) -> Tensor:
        before = tile.n_before - tile.low
        return x[:, :, keys.start + before : keys.stop + before]
