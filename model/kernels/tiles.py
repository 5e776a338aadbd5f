"""Causal attention in tiles: a block of queries over just the keys that its window reaches, forward and backward.

    window = 4, block = 3           keys  0 1 2 3 4 5       work in proportion to T x (window + block), memory of one
    the tile of queries 3 4 5:            x x x x           tile; only its first and last columns need a mask
                                            x x x x
                                              x x x x

Matrix products run in the dtype of q, the softmax in float32 inside, sums over tiles in float32. In bfloat16 the scores
are rounded before the softmax, which a fused kernel does not do. One custom operator: torch.compile takes it whole.
A learned sink is one more key: of zeros, with a value of zeros, first among a tile's keys; its score is overwritten.

Dimensions: B batch, H query heads, K KV heads, R = H / K, T time, D head_dim, b block, S sinks and
the learned one, L keys of the band.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.visible import sees

TILE_BYTES = 4 << 20  # of scores that exist at a time: batch and heads go in parts of this size


@torch.library.custom_op("sash::tiles", mutates_args=())
def tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    n_sink: int,
    block: int,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """(B, H, T, D) over (B, K, T, D) -> (B, H, T, D): each query over its last `window` keys and the first n_sink.

    Scores are products times scale (none: 1 / sqrt(D)), capped, less slopes (H,) times the distance; sink_logit (H,)
    joins the softmax's denominator.
    """
    tiling = _Tiling.of(q, window, n_sink, block, scale, softcap, slopes, sink_logit)
    out = torch.empty_like(q)
    for (out_, q_), (k_, v_), heads in tiling.parts([out, q], [k, v], [slopes, sink_logit]):
        for tile in tiling:
            p = tiling.probabilities(tile, tiling.scores(tile, q_, k_), *heads)  # (N, R b, S + L)
            tile.set_queries(out_, torch.bmm(p, tile.keys(v_)))
            del p  # before the next tile has its own
    return out


@torch.library.custom_op("sash::tiles_backward", mutates_args=())
def tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    n_sink: int,
    block: int,
    scale: float | None,
    softcap: float | None,
    slopes: Tensor | None,
    sink_logit: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sink_logit; probabilities are computed again, a tile at a time (the idea of 2205.14135)."""
    tiling = _Tiling.of(q, window, n_sink, block, scale, softcap, slopes, sink_logit)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dsink = q.new_zeros(0) if sink_logit is None else torch.zeros_like(sink_logit)
    per_head = [slopes, sink_logit, None if sink_logit is None else dsink]
    for (dq_, grad_, q_), (dk_, dv_, k_, v_), heads in tiling.parts([dq, grad, q], [dk, dv, k, v], per_head):
        *heads, dsink_ = heads
        sum_k, sum_v = _KeySums(dk_, tiling), _KeySums(dv_, tiling)
        for tile in tiling:
            scores = tiling.scores(tile, q_, k_)
            slope = None if softcap is None else 1 - (scores / softcap).square_()
            p = tiling.probabilities(tile, scores, *heads)  # (N, R b, S + L)
            del scores
            dout = tile.queries(grad_)  # (N, R b, D)
            sum_v.add(tile, torch.bmm(p.transpose(1, 2), dout))
            ds = _softmax_backward(torch.bmm(dout, tile.keys(v_).transpose(1, 2)), p)
            if dsink_ is not None:
                dsink_ += tile.by_head(ds[..., 0], dsink_).sum(dim=(0, 3), dtype=dsink_.dtype)
            if slope is not None:
                ds *= slope
            del p, slope
            ds *= tiling.scale
            tile.set_queries(dq_, torch.bmm(ds, tile.keys(k_)))
            sum_k.add(tile, torch.bmm(ds.transpose(1, 2), tile.queries(q_)))
            del ds
        sum_k.finish()
        sum_v.finish()
    return dq, dk, dv, dsink


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries start to stop over keys low to stop and, before those, the first n_sink; first of all the learned one."""

    start: int
    stop: int
    low: int
    n_sink: int
    learned: bool

    @property
    def n_before(self) -> int:
        """Columns before the band."""
        return self.n_sink + self.learned

    def queries(self, x: Tensor) -> Tensor:
        """Its rows of (B, K, R, T, D) -> (N, R b, D), N = B K: the query heads of a KV head share its keys."""
        return x[:, :, :, self.start : self.stop].reshape(len(x) * x.shape[1], -1, x.shape[-1])

    def set_queries(self, x: Tensor, rows: Tensor) -> None:
        """Put (N, R b, D) where `queries` takes it from."""
        place = x[:, :, :, self.start : self.stop]
        place.copy_(rows.view(place.shape))

    def keys(self, x: Tensor) -> Tensor:
        """Its rows of (B, K, T, D) -> (N, S + L, D): the sinks, then the band."""
        keys = x[:, :, self.low : self.stop]
        if self.n_sink:
            keys = torch.cat((x[:, :, : self.n_sink], keys), dim=2)
        if self.learned:
            keys = F.pad(keys, (0, 0, 1, 0))
        return keys.flatten(0, 1)

    def by_head(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, R b, ...) -> (B, K, R, b, ...), for what is (K, R) `like` this."""
        return x.view(-1, *like.shape, self.stop - self.start, *x.shape[2:])

    def distances(self, like: Tensor) -> Tensor:
        """(b, S + L) from each query back to each key; to the learned sink none."""
        pos = torch.arange(self.stop, device=like.device)
        back = pos[self.start :, None] - torch.cat((pos[: self.n_sink], pos[self.low :]))
        return (F.pad(back, (1, 0)) if self.learned else back).to(like.dtype)


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
        x = x.view(*self.out.shape[:2], *x.shape[1:])
        band = x[:, :, tile.n_before :]
        if tile.n_sink:
            self.sinks[:, :, : tile.n_sink] += x[:, :, tile.learned : tile.n_before]
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
    """How the T x T square is cut into tiles, and what becomes of a tile's products."""

    T: int
    window: int
    n_sink: int
    block: int
    scale: float
    softcap: float | None
    learned: bool
    _masks: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        q: Tensor,
        window: int,
        n_sink: int,
        block: int,
        scale: float | None = None,
        softcap: float | None = None,
        _slopes: Tensor | None = None,
        sink_logit: Tensor | None = None,
    ) -> "_Tiling":
        """As the operators are called."""
        T, D = q.shape[2:]
        return cls(T, window, n_sink, block, D**-0.5 if scale is None else scale, softcap, sink_logit is not None)

    def __iter__(self) -> Iterator[_Tile]:
        for start in range(0, self.T, self.block):
            low = max(0, start - self.window + 1)
            yield _Tile(start, min(self.T, start + self.block), low, min(self.n_sink, low), self.learned)

    def parts(
        self, queries: list[Tensor], keys: list[Tensor], per_head: list[Tensor | None]
    ) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor | None]]]:
        """Views of (B, H, T, D) as (B, K, R, T, D), of (B, K, T, D), and of (H,) as (K, R), or None.

        As many rows and KV heads as make a tile.
        """
        B, K = keys[0].shape[:2]
        queries = [x.unflatten(1, (K, -1)) for x in queries]
        per_head = [x if x is None else x.unflatten(0, (K, -1)) for x in per_head]
        rows, heads = self.part(B, K, queries[0].shape[2], keys[0].element_size())
        for b in range(0, B, rows):
            for h in range(0, K, heads):
                here = (slice(b, b + rows), slice(h, h + heads))
                of_heads = [x if x is None else x[here[1]] for x in per_head]
                yield [x[here] for x in queries], [x[here] for x in keys], of_heads

    def part(self, B: int, K: int, R: int, element_size: int) -> tuple[int, int]:
        """How many rows and KV heads at a time."""
        tile_bytes = R * self.block * self.keys_of_tile * element_size
        heads = min(K, max(1, TILE_BYTES // tile_bytes))
        return min(B, max(1, TILE_BYTES // (tile_bytes * heads))), heads

    @property
    def keys_of_tile(self) -> int:
        return min(self.T, self.window + self.block + self.n_sink) + self.learned

    def scores(self, tile: _Tile, q: Tensor, k: Tensor) -> Tensor:
        """(N, R b, S + L): products, scaled and capped."""
        scores = torch.bmm(tile.queries(q) * self.scale, tile.keys(k).transpose(1, 2))
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def probabilities(self, tile: _Tile, scores: Tensor, slopes: Tensor | None, sink_logit: Tensor | None) -> Tensor:
        """(N, R b, S + L): the softmax over what each query sees. Overwrites the scores."""
        if slopes is not None:
            tile.by_head(scores, slopes).addcmul_(slopes[:, :, None, None], tile.distances(scores), value=-1)
        square = scores.unflatten(1, (-1, tile.stop - tile.start))  # (N, R, b, S + L), a view
        newest, oldest = self._edges(tile, scores)
        square[..., -newest.shape[1] :] += newest
        square[..., tile.n_before : tile.n_before + oldest.shape[1]] += oldest
        if sink_logit is not None:
            tile.by_head(scores[..., 0], sink_logit)[:] = sink_logit[:, :, None]
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


def work_bytes(q: Tensor, k: Tensor, *numbers: Any, backward: bool) -> int:
    """What a call holds beside its arguments and results, of shapes alone; `numbers` follow v among them."""
    (B, H, _, D), K = q.shape, k.shape[1]
    tiling = _Tiling.of(q, *numbers)
    rows, heads = tiling.part(B, K, H // K, q.element_size())
    largest = max((tile.stop - tile.start) * (tile.n_before + tile.stop - tile.low) for tile in tiling)
    scores = rows * heads * (H // K) * largest * q.element_size()
    sums = rows * heads * tiling.keys_of_tile * D * max(4, q.element_size())
    if not backward:
        return 2 * scores
    return (2 + (tiling.softcap is not None)) * scores + sums * (4 if q.element_size() < 4 else 2)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, *ctx.numbers, slopes, sink_logit = inputs
    ctx.save_for_backward(q, k, v, slopes, sink_logit)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, sink_logit = ctx.saved_tensors
    *dqkv, dsink = tiles_backward(grad, q, k, v, *ctx.numbers, slopes, sink_logit)
    return *dqkv, *[None] * len(ctx.numbers), None, None if sink_logit is None else dsink


tiles.register_autograd(_backward, setup_context=_save)
tiles.register_fake(lambda q, *_: torch.empty_like(q))
tiles_backward.register_fake(
    lambda grad, q, k, v, *numbers: (
        *(torch.empty_like(x) for x in (q, k, v)),
        q.new_empty(0) if numbers[-1] is None else torch.empty_like(numbers[-1]),
    )
)
