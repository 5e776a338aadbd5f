"""Causal attention in tiles: a block of queries over just the keys that its window reaches, forward and backward.

    window = 4, block = 3           keys  0 1 2 3 4 5       work in proportion to T x (window + block), memory of one
    the tile of queries 3 4 5:            x x x x           tile; only its first and last columns need a mask
                                            x x x x
                                              x x x x

Matrix products run in the dtype of q, the softmax in float32 inside, sums over tiles in float32. In bfloat16 the scores
are rounded before the softmax, which a fused kernel does not do. One custom operator: torch.compile takes it whole.

Dimensions: B batch, H query heads, K KV heads, R = H / K, T time, D head_dim, b block, S sinks, L keys of the band.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.visible import sees

TILE_BYTES = 4 << 20  # of scores that exist at a time: batch and heads go in parts of this size


@torch.library.custom_op("sash::tiles", mutates_args=())
def tiles(q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, block: int) -> Tensor:
    """(B, H, T, D) over (B, K, T, D) -> (B, H, T, D): each query over its last `window` keys and the first n_sink."""
    tiling = _Tiling(q.shape[2], window, n_sink, block)
    out = torch.empty_like(q)
    for out_, q_, k_, v_ in tiling.parts([out, q], [k, v]):
        for tile in tiling:
            p = tiling.probabilities(tile, q_, k_)  # (N, R b, S + L)
            tile.set_queries(out_, torch.bmm(p, tile.keys(v_)))
    return out


@torch.library.custom_op("sash::tiles_backward", mutates_args=())
def tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, n_sink: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again, a tile at a time (the idea of 2205.14135)."""
    tiling = _Tiling(q.shape[2], window, n_sink, block)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for dq_, grad_, q_, dk_, dv_, k_, v_ in tiling.parts([dq, grad, q], [dk, dv, k, v]):
        sum_k, sum_v = _KeySums(dk_, tiling), _KeySums(dv_, tiling)
        for tile in tiling:
            p = tiling.probabilities(tile, q_, k_)  # (N, R b, S + L)
            dout = tile.queries(grad_)  # (N, R b, D)
            sum_v.add(tile, torch.bmm(p.transpose(1, 2), dout))
            ds = _softmax_backward(torch.bmm(dout, tile.keys(v_).transpose(1, 2)), p)
            del p
            ds *= scale
            tile.set_queries(dq_, torch.bmm(ds, tile.keys(k_)))
            sum_k.add(tile, torch.bmm(ds.transpose(1, 2), tile.queries(q_)))
        sum_k.finish()
        sum_v.finish()
    return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries start to stop over keys low to stop and, before those, the first n_sink."""

    start: int
    stop: int
    low: int
    n_sink: int

    def queries(self, x: Tensor) -> Tensor:
        """Its rows of (B, K, R, T, D) -> (N, R b, D), N = B K: the query heads of a KV head share its keys."""
        return x[:, :, :, self.start : self.stop].reshape(len(x) * x.shape[1], -1, x.shape[-1])

    def set_queries(self, x: Tensor, rows: Tensor) -> None:
        """Put (N, R b, D) where `queries` takes it from."""
        place = x[:, :, :, self.start : self.stop]
        place.copy_(rows.view(place.shape))

    def keys(self, x: Tensor) -> Tensor:
        """Its rows of (B, K, T, D) -> (N, S + L, D): the sinks, then the band."""
        band = x[:, :, self.low : self.stop]
        return (torch.cat((x[:, :, : self.n_sink], band), dim=2) if self.n_sink else band).flatten(0, 1)


class _KeySums:
    """Sums over tiles in float32: of a half type, no more of them is kept than later tiles still add to."""

    def __init__(self, out: Tensor, tiling: "_Tiling"):
        self.out = out  # (B, K, T, D)
        self.tiling = tiling
        self.dtype = torch.promote_types(out.dtype, torch.float32)
        self.open = out.new_empty((), dtype=self.dtype)  # (B, K, L, D) sums of the keys that end at `stop`
        self.stop = 0
        self.sinks = out.new_zeros(*out.shape[:2], min(tiling.n_sink, tiling.T), out.shape[3], dtype=self.dtype)

    def add(self, tile: _Tile, x: Tensor) -> None:
        """x (N, S + L, D) to the keys of the tile."""
        band = x.view(*self.out.shape[:2], *x.shape[1:])
        if tile.n_sink:
            self.sinks[:, :, : tile.n_sink] += band[:, :, : tile.n_sink]
            band = band[:, :, tile.n_sink :]
        n_old = self.stop - tile.low  # keys that earlier tiles have added to
        if self.out.dtype == self.dtype:
            self.out[:, :, tile.low : self.stop] += band[:, :, :n_old]
            self.out[:, :, self.stop : tile.stop] = band[:, :, n_old:]
        else:
            band = band.to(self.dtype)
            if n_old:
                band[:, :, :n_old] += self.open[:, :, -n_old:]
            del self.open  # before the next one is made
            n_done = max(0, tile.stop - self.tiling.window + 1) - tile.low  # no later tile reaches them
            n_done = band.shape[2] if tile.stop == self.tiling.T else n_done
            self.out[:, :, tile.low : tile.low + n_done] = band[:, :, :n_done]
            self.open = band[:, :, n_done:].clone()
        self.stop = tile.stop

    def finish(self) -> None:
        """Add what the sinks received beside the band."""
        self.out[:, :, : self.sinks.shape[2]] += self.sinks


@dataclass(slots=True)
class _Tiling:
    """How the T x T square is cut into tiles."""

    T: int
    window: int
    n_sink: int
    block: int
    _masks: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[_Tile]:
        for start in range(0, self.T, self.block):
            low = max(0, start - self.window + 1)
            yield _Tile(start, min(self.T, start + self.block), low, min(self.n_sink, low))

    def parts(self, queries: list[Tensor], keys: list[Tensor]) -> Iterator[list[Tensor]]:
        """Views of (B, H, T, D) as (B, K, R, T, D) and of (B, K, T, D), as many rows and KV heads as make a tile."""
        B, K = keys[0].shape[:2]
        views = [x.unflatten(1, (K, -1)) for x in queries] + keys
        rows, heads = self.part(B, K, views[0].shape[2], keys[0].element_size())
        for b in range(0, B, rows):
            for h in range(0, K, heads):
                yield [x[b : b + rows, h : h + heads] for x in views]

    def part(self, B: int, K: int, R: int, element_size: int) -> tuple[int, int]:
        """How many rows and KV heads at a time."""
        tile_bytes = R * self.block * self.keys_of_tile * element_size
        heads = min(K, max(1, TILE_BYTES // tile_bytes))
        return min(B, max(1, TILE_BYTES // (tile_bytes * heads))), heads

    @property
    def keys_of_tile(self) -> int:
        return min(self.T, self.window + self.block + self.n_sink)

    def probabilities(self, tile: _Tile, q: Tensor, k: Tensor) -> Tensor:
        """(N, R b, S + L): the softmax over what each query sees."""
        scores = torch.bmm(tile.queries(q) * q.shape[-1] ** -0.5, tile.keys(k).transpose(1, 2))
        square = scores.unflatten(1, (-1, tile.stop - tile.start))  # (N, R, b, S + L), a view
        newest, oldest = self._edges(tile, scores)
        square[..., -newest.shape[1] :] += newest
        square[..., tile.n_sink : tile.n_sink + oldest.shape[1]] += oldest
        return torch.softmax(scores, dim=-1)

    def _edges(self, tile: _Tile, like: Tensor) -> list[Tensor]:
        """Additive masks of the columns that some query of the tile does not see: its own block, and the oldest."""
        n_old = max(0, tile.stop - self.window - tile.low)
        key = (tile.stop - tile.start, n_old, max(0, self.n_sink - tile.low))
        if key not in self._masks:
            q = torch.arange(tile.start, tile.stop, device=like.device)[:, None]
            columns = (q.T, torch.arange(tile.low, tile.low + n_old, device=like.device)[None])
            hidden = [~sees(q, column, self.window, self.n_sink) for column in columns]
            self._masks[key] = [torch.zeros_like(h, dtype=like.dtype).masked_fill_(h, -torch.inf) for h in hidden]
        return self._masks[key]


def _softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient of the scores, of that of the probabilities p."""
    if grad.device.type == "cpu":  # which reads a row before it writes it: the tile can be overwritten
        return torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    return torch._softmax_backward_data(grad, p, -1, p.dtype)


def block_size(window: int, dtype: torch.dtype) -> int:
    """What measured fastest among those that need no more memory than fused full attention: wide ones waste pairs."""
    if dtype in (torch.bfloat16, torch.float16):
        return 96 if window < 1024 else 256
    return 64


def work_bytes(q: Tensor, k: Tensor, window: int, n_sink: int, block: int, *, backward: bool) -> int:
    """What a call holds beside its arguments and results, of shapes alone."""
    (B, H, T, D), K = q.shape, k.shape[1]
    tiling = _Tiling(T, window, n_sink, block)
    rows, heads = tiling.part(B, K, H // K, q.element_size())
    scores = rows * heads * (H // K) * min(T, block) * tiling.keys_of_tile * q.element_size()
    sums = rows * heads * tiling.keys_of_tile * D * max(4, q.element_size())
    if not backward:
        return 2 * scores
    return 2 * scores + sums * (4 if q.element_size() < 4 else 2)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *tiles_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None


tiles.register_autograd(_backward, setup_context=_save)
tiles.register_fake(lambda q, k, v, window, n_sink, block: torch.empty_like(q))
tiles_backward.register_fake(lambda grad, q, k, v, *_: tuple(torch.empty_like(x) for x in (q, k, v)))
