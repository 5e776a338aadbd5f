"""Causal attention in tiles: a block of queries over only the keys within its window, forward and backward.

    window = 4, block = 3           keys  0 1 2 3 4 5       work proportional to T x (window + block), memory of one
    the tile of queries 3 4 5:            x x x x           tile; only its first and last columns need a mask
                                            x x x x
                                              x x x x

Matmuls run in the dtype of q; the softmax and sums over tiles use float32. In bfloat16 the scores are rounded before
the softmax, unlike in a fused kernel. It is a single custom operator, opaque to torch.compile. A learned sink is an
extra key of zeros with a value of zeros, first among a tile's keys; its score is overwritten.

Dimensions: B batch, H query heads, K KV heads, R = H / K, T time, D head_dim, b block, S sinks including the learned
one, L keys of the band.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model import cpu
from model.attention.kernels.workspace import KVGradAccumulator, Tile, Workspace
from model.attention.mask import mask_mod

ALIGN = 32  # the keys of a tile are a multiple of this, which fills whole vector registers
TILE_BYTES = 4 << 20  # most bytes of scores at a time: batch and heads are split accordingly


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
    """(B, H, Tq, D) over (B, K, T, D) keys and (B, K, T, Dv) values -> (B, H, Tq, Dv).

    The queries are at the positions of the last Tq keys: all keys in training, the new chunk with a cache. Each attends
    to the last `window` keys (itself included) and the first n_sink. Scores are q k times scale (None: 1 / sqrt(D)),
    soft-capped, minus slopes (H,) times the distance; sink_logit (H,) is added to the softmax denominator.
    """
    tiling = Tiling.of(q, k, window, n_sink, block, scale, softcap, slopes, sink_logit)
    out, workspace = _empty_out(q, v), Workspace(q)
    for (out_, q_), (k_, v_), heads in tiling.parts([out, q], [k, v], [slopes, sink_logit]):
        for tile in tiling:
            rows = workspace.queries("q", tile, q_, tiling.scale)
            scores = tiling.scores(rows, workspace.keys("keys", tile, k_), workspace)  # (N, R b, S + L)
            p = tiling.probabilities(tile, scores, workspace, *heads)
            workspace.put(out_, tile, workspace.product("q", p, workspace.keys("keys", tile, v_)))
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
    """Gradients of q, k, v, sink_logit; the probabilities are recomputed tile by tile (2205.14135)."""
    tiling = Tiling.of(q, k, window, n_sink, block, scale, softcap, slopes, sink_logit)
    dq, dk, dv = (torch.empty_like(x) if tiling.first == 0 else torch.zeros_like(x) for x in (q, k, v))
    dsink = q.new_zeros(0) if sink_logit is None else torch.zeros_like(sink_logit)
    per_head, workspace = [slopes, sink_logit, None if sink_logit is None else dsink], Workspace(q)
    n_open = tiling.n_open
    for (dq_, grad_, q_), (dk_, dv_, k_, v_), heads in tiling.parts([dq, grad, q], [dk, dv, k, v], per_head):
        *heads, dsink_ = heads
        sum_k, sum_v = (
            KVGradAccumulator(name, x, n_open, n_sink, workspace) for name, x in (("sums k", dk_), ("sums v", dv_))
        )
        for tile in tiling:
            rows, dout = (
                workspace.queries("q", tile, q_, tiling.scale),
                workspace.queries("dout", tile, grad_),
            )  # (N, R b, D)
            keys = workspace.keys("keys", tile, k_)
            scores = tiling.scores(rows, keys, workspace)  # (N, R b, S + L)
            cap_grad = tiling.cap_grad(scores, workspace)
            p = tiling.probabilities(tile, scores, workspace, *heads)
            sum_v.add(tile, workspace.product("values", p.mT, dout))
            ds = workspace.product("scores", dout, workspace.keys("values", tile, v_).mT)
            ds = _softmax_backward(ds, p)
            if dsink_ is not None:
                dsink_ += tile.by_head(ds[..., 0], dsink_).sum(dim=(0, 3), dtype=dsink_.dtype)
            if cap_grad is not None:
                ds *= cap_grad
            sum_k.add(tile, workspace.product("values", ds.mT, rows))
            workspace.put(dq_, tile, workspace.product("q", ds, keys), tiling.scale)
        sum_k.finish(tiling.first)
        sum_v.finish(tiling.first)
    return dq, dk, dv, dsink


@dataclass(slots=True)
class Tiling:
    """How the T x T scores are split into tiles, and how a tile's scores are computed."""

    T: int
    first: int  # position of the first query
    window: int
    n_sink: int
    block: int
    scale: float
    softcap: float | None
    learned: bool
    _masks: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)  # of the last tile shape

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        window: int,
        n_sink: int,
        block: int,
        scale: float | None = None,
        softcap: float | None = None,
        _slopes: Tensor | None = None,
        sink_logit: Tensor | None = None,
    ) -> "Tiling":
        """Construct from the arguments of the operators."""
        T, D = k.shape[2:]
        scale, learned = D**-0.5 if scale is None else scale, sink_logit is not None
        return cls(T, T - q.shape[2], window, n_sink, block, scale, softcap, learned)

    def __iter__(self) -> Iterator[Tile]:
        """Tiles from the last queries to the first, so a key is complete with the tile of queries at its position."""
        before = self.n_sink + self.learned
        for start in reversed(range(self.first, self.T, self.block)):
            stop = min(self.T, start + self.block)
            low = max(0, (start - self.window + 1 - before) // ALIGN * ALIGN + before)
            end = stop if self.first == 0 else low + _one_of_few(stop - low)
            rows = slice(start - self.first, stop - self.first)
            yield Tile(start, stop, rows, low, end, min(self.n_sink, low), self.learned)

    def parts(
        self, queries: list[Tensor], keys: list[Tensor], per_head: list[Tensor | None]
    ) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor | None]]]:
        """Split batch and KV heads into parts whose tiles have at most TILE_BYTES.

        Yields views of `queries` as (B, K, R, T, D), of `keys` (B, K, T, D), and of `per_head` (H,) as (K, R) or None.
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
        """Number of batch rows and KV heads per part."""
        tile_bytes = R * self.block * self.keys_of_tile * element_size
        heads = min(K, max(1, TILE_BYTES // tile_bytes))
        heads = -(-K // -(-K // heads))  # parts of equal size
        return min(B, max(1, TILE_BYTES // (tile_bytes * heads))), heads

    @property
    def keys_of_tile(self) -> int:
        return min(self.T, self.window + self.block + self.n_sink) + self.learned

    @property
    def n_open(self) -> int:
        """The most keys of a tile that later tiles still contribute to."""
        return max(tile.start - tile.low for tile in self)

    def scores(self, rows: Tensor, keys: Tensor, workspace: Workspace) -> Tensor:
        """Soft-capped scores (N, R b, S + L)."""
        scores = workspace.product("scores", rows, keys.mT)
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def cap_grad(self, scores: Tensor, workspace: Workspace) -> Tensor | None:
        """Derivative of the soft-cap, computed from the capped scores."""
        if self.softcap is None:
            return None
        return torch.div(scores, self.softcap, out=workspace.take("cap_grad", *scores.shape)).square_().neg_().add_(1)

    def probabilities(
        self, tile: Tile, scores: Tensor, workspace: Workspace, slopes: Tensor | None, sink_logit: Tensor | None
    ) -> Tensor:
        """Softmax (N, R b, S + L) over the keys that each query attends to. Overwrites the scores."""
        if slopes is not None:
            tile.by_head(scores, slopes).addcmul_(slopes[:, :, None, None], tile.distances(scores), value=-1)
        square = scores.unflatten(1, (-1, tile.stop - tile.start))  # (N, R, b, S + L), a view
        newest, oldest = self.edges(tile, scores)
        own = tile.n_before + tile.start - tile.low
        square[..., own : own + len(newest)].add_(newest)
        if tile.end > tile.stop:
            square[..., own + len(newest) :] = -torch.inf
        if oldest.shape[1]:
            square[..., tile.n_before : tile.n_before + oldest.shape[1]].add_(oldest)
        if sink_logit is not None:
            tile.by_head(scores[..., 0], sink_logit)[:] = sink_logit[:, :, None]
        return torch.softmax(scores, dim=-1, out=workspace.take("p", *scores.shape))

    def edges(self, tile: Tile, like: Tensor) -> list[Tensor]:
        """Additive masks of the columns hidden from some queries of the tile: its newest and its oldest keys."""
        n_old = max(0, tile.stop - self.window - tile.low)
        key = (tile.stop - tile.start, n_old, max(0, self.n_sink - tile.low))
        if key not in self._masks:
            pos = torch.arange(tile.stop, device=like.device, dtype=torch.int32)
            q, columns = pos[tile.start :, None], (pos[None, tile.start :], pos[None, tile.low : tile.low + n_old])
            hidden = [~mask_mod(q, column, self.window, self.n_sink) for column in columns]
            self._masks.clear()  # free them before allocating the next ones
            self._masks[key] = [torch.zeros_like(h, dtype=like.dtype).masked_fill_(h, -torch.inf) for h in hidden]
        return self._masks[key]


def _one_of_few(n: int) -> int:
    """Round n up by at most an eighth: CPU matmuls cache code per shape, and a growing KV cache changes its length."""
    step = max(ALIGN, (1 << n.bit_length()) // 16)
    return -(-n // step) * step


def _softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """Gradient of the scores from `grad`, the gradient of the probabilities p."""
    if grad.device.type == "cpu":  # the CPU kernel reads each row before writing it, so it can work in place
        return torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    return torch._softmax_backward_data(grad, p, -1, p.dtype)


def block_size(window: int, dtype: torch.dtype) -> int:
    """The fastest block size, measured, with no more memory than fused full attention; wide blocks waste work."""
    if dtype in (torch.bfloat16, torch.float16):
        least = 96 if cpu.has_avx512_bf16() else 64  # without it, fused attention needs less memory
        return min(256, max(least, window // 4 // ALIGN * ALIGN))
    return 64


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """(B, H, Tq, Dv), in the memory order of q."""
    return torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:3], v.shape[-1])


def work_bytes(q: Tensor, k: Tensor, v: Tensor, *numbers: Any, backward: bool) -> int:
    """Workspace of a call in bytes, computed from shapes; `numbers` are the arguments after v."""
    (B, H, _, D), K, Dv = q.shape, k.shape[1], v.shape[-1]
    tiling = Tiling.of(q, k, *numbers)
    rows, heads = tiling.part(B, K, H // K, q.element_size())
    largest = max((tile.stop - tile.start) * (tile.n_before + tile.end - tile.low) for tile in tiling)
    scores = rows * heads * (H // K) * largest * q.element_size()
    keys, values = (rows * heads * tiling.keys_of_tile * width * q.element_size() for width in (D, Dv))
    queries, outs = (rows * heads * (H // K) * tiling.block * width * q.element_size() for width in (D, Dv))
    half = q.element_size() < 4
    if not backward:
        return 2 * scores + half * max(keys, values) + max(queries, outs)
    sums = rows * heads * tiling.n_open * (D + Dv) * 4 if half else 0
    buffers = half * (keys + queries) + max(keys, values) + max(outs, queries)
    return (2 + (tiling.softcap is not None)) * scores + buffers + sums


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, *ctx.numbers, slopes, sink_logit = inputs
    ctx.save_for_backward(q, k, v, slopes, sink_logit)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, sink_logit = ctx.saved_tensors
    *dqkv, dsink = tiles_backward(grad, q, k, v, *ctx.numbers, slopes, sink_logit)
    return *dqkv, *[None] * len(ctx.numbers), None, None if sink_logit is None else dsink


tiles.register_autograd(_backward, setup_context=_save)
tiles.register_fake(lambda q, k, v, *_: _empty_out(q, v))
tiles_backward.register_fake(
    lambda grad, q, k, v, *numbers: (
        *(torch.empty_like(x) for x in (q, k, v)),
        q.new_empty(0) if numbers[-1] is None else torch.empty_like(numbers[-1]),
    )
)

WORKSPACE: dict[
    Any, tuple[Callable[..., int], int]
] = {  # operator -> its workspace in bytes, and the index of q among its arguments
    torch.ops.sash.tiles.default: (work_bytes, 0),
    torch.ops.sash.tiles_backward.default: (work_bytes, 1),
}
