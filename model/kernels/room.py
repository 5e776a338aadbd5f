"""What the tiles of `model.kernels.tiles` hold, one after the other in the same memory.

Dimensions: as there: B batch, K KV heads, R query heads of each, T time, D head_dim, b block, S sinks and the learned
one, L keys of the band, N = B K.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries start to stop over keys low to stop and, before those, the first n_sink; first of all the learned one."""

    start: int
    stop: int
    rows: slice  # where those queries are: the first of them may stand at any key
    low: int
    end: int  # columns go on to here, over keys that no query of the tile sees
    n_sink: int
    learned: bool

    @property
    def n_before(self) -> int:
        """Columns before the band."""
        return self.n_sink + self.learned

    def by_head(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, R b, ...) -> (B, K, R, b, ...), for what is (K, R) `like` this."""
        return x.view(-1, *like.shape, self.stop - self.start, *x.shape[2:])

    def distances(self, like: Tensor) -> Tensor:
        """(b, S + L) from each query back to each key; to the learned sink none."""
        pos = torch.arange(self.end, device=like.device)
        back = pos[self.start : self.stop, None] - torch.cat((pos[: self.n_sink], pos[self.low :]))
        return (F.pad(back, (1, 0)) if self.learned else back).to(like.dtype)


class Room:
    """Memory that tiles use one after the other: were each product's new, its page faults would cost as much as it."""

    def __init__(self, like: Tensor):
        self.like = like
        self.packs = like.element_size() < 4  # a CPU multiplies half types in one piece, and would copy at each product
        self.free = ["sums 1", "sums 2", "sums 3"]  # where sums of keys are not
        self._flat: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What has this name, of this shape, uninitialised."""
        views = self._views.setdefault(name, {})
        if shape not in views:
            n = math.prod(shape)
            if name not in self._flat or self._flat[name].numel() < n:
                views.clear()
                self._flat.pop(name, None)  # before the larger one is there
                self._flat[name] = self.like.new_empty(n, dtype=dtype)
            views[shape] = self._flat[name][:n].view(shape)
        return views[shape]

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """(N, n, m) of (N, n, i) and (N, i, m)."""
        return torch.bmm(a, b, out=self.take(name, len(a), a.shape[1], b.shape[2]))

    def queries(self, name: str, tile: Tile, x: Tensor, scale: float = 1.0) -> Tensor:
        """The tile's rows of (B, K, R, T, D) -> (N, R b, D), N = B K: the query heads of a KV head share its keys."""
        rows = x[:, :, :, tile.rows]
        if scale != 1 or self.packs:
            rows = torch.mul(rows, scale, out=self.take(name, *rows.shape))
        return rows.reshape(rows.shape[0] * rows.shape[1], -1, rows.shape[4])

    def put(self, x: Tensor, tile: Tile, rows: Tensor, scale: float = 1.0) -> None:
        """(N, R b, D) to where `queries` takes it from."""
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


class KeySums:
    """Sums over tiles in float32: of a half type, no more of them is kept than later tiles still add to."""

    def __init__(self, out: Tensor, n_sink: int, room: Room):
        self.out, self.room, self.name = out, room, room.free.pop()  # (B, K, T, D)
        self.dtype = torch.promote_types(out.dtype, torch.float32)
        self.open = out.new_empty(*out.shape[:2], 0, out.shape[3], dtype=self.dtype)  # of the keys before the last tile
        self.sinks = out.new_zeros(*out.shape[:2], min(n_sink, out.shape[2]), out.shape[3], dtype=self.dtype)

    def add(self, tile: Tile, x: Tensor) -> None:
        """x (N, S + L, D) to the keys of the tile."""
        x = x.unflatten(0, self.out.shape[:2])
        if tile.n_sink:
            self.sinks[:, :, : tile.n_sink] += x[:, :, tile.learned : tile.n_before]
        band, n_old = x[:, :, tile.n_before : tile.n_before + tile.stop - tile.low], self.open.shape[2]
        n_new = band.shape[2] - n_old  # keys that no tile has added to
        if self.out.dtype == self.dtype:
            self.out[:, :, tile.low : tile.low + n_new].copy_(band[:, :, :n_new])
            self.out[:, :, tile.low + n_new : tile.stop].add_(band[:, :, n_new:])
            self.open = self.out[:, :, tile.low : tile.start]
        else:
            spare = self.room.free.pop()
            sums = self.room.take(spare, *band.shape, dtype=self.dtype)
            self.room.free.append(self.name)
            self.name = spare
            sums.copy_(band)
            if n_old:
                sums[:, :, n_new:].add_(self.open)
            self.open, done = sums.split((tile.start - tile.low, tile.stop - tile.start), dim=2)
            self.out[:, :, tile.start : tile.stop].copy_(done)  # no later tile reaches them
        self.low = tile.low

    def finish(self) -> None:
        """Keep the sums of keys before the first query, and add what the sinks received beside the band."""
        if self.open.shape[2] and self.out.dtype != self.dtype:
            self.out[:, :, self.low : self.low + self.open.shape[2]].copy_(self.open)
        self.out[:, :, : self.sinks.shape[2]] += self.sinks
        self.room.free.append(self.name)
