"""The rolling KV cache: a sliding layer keeps `n_sink + window` slots, a full layer is a ring that never wraps.

    window = 4, n_sink = 1, after 8 tokens        slot      0 | 1 2 3 4
                                                  holds     0 | 5 6 7 4     position p > 0 lives in slot 1 + (p - 1) % 4

The position in a slot follows from the number of tokens seen, so positions are computed rather than stored. Slots may
be in any order, because keys are returned together with their positions.

Dimensions: B batch, K KV heads, S slots, T incoming tokens, D head_dim (of values: v_head_dim).
"""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from model.context import EMPTY, ForwardContext
from model.int8 import to_int8
from model.state import LayerState

SCALE = torch.bfloat16  # dtype of the scales of an int8 cache


def n_slots(window: int | None, n_sink: int, max_length: int) -> int:
    """Number of slots that a layer needs for sequences of up to max_length tokens."""
    return max_length if window is None else min(max_length, n_sink + window)


def slot_positions(n_seen: Tensor, n_slots: int, n_sink: int, first: int | None = None) -> Tensor:
    """(B,) tokens seen -> (B, S) the position in each slot (or in the `first` slots), EMPTY if it holds none."""
    slot = torch.arange(n_slots if first is None else first, device=n_seen.device)
    last, n_ring = n_seen[:, None] - 1, n_slots - n_sink
    pinned = slot < n_sink
    behind = n_sink + (last - n_sink) % n_ring - slot  # tokens behind the newest, without dividing per slot
    rolling = last - torch.where(behind < 0, behind + n_ring, behind)
    pos = torch.where(pinned, slot, rolling)
    held = (pos <= last) & (pinned | (rolling >= n_sink))
    return torch.where(held, pos, EMPTY)  # (B, S)


class KVCache:
    """Keys and values of one layer, in pre-allocated slots."""

    def __init__(self, k: Tensor, v: Tensor, *, n_sink: int = 0, max_length: int | None):
        """k, v: zeros (B, K, S, D), (B, K, S, Dv): n_sink pinned slots, then a ring buffer.

        max_length: longest sequence that fits; None if the ring may wrap.
        """
        self.k, self.v = k, v
        self.n_slots = k.shape[2]
        self.n_sink = min(n_sink, self.n_slots - 1)  # with fewer slots than sinks nothing ever wraps
        self.max_length = max_length

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.k, self.v]

    def fork(self, n: int) -> Self:
        copies = (x.repeat_interleave(n, dim=0) for x in self.tensors())
        return type(self)(*copies, n_sink=self.n_sink, max_length=self.max_length)

    def _packed(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """(B, K, T, D) keys and values in their stored form, in the order of tensors()."""
        return k.to(self.k.dtype), v.to(self.v.dtype)

    def _unpacked(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = stored
        return k.to(dtype), v.to(dtype)

    def update(self, k: Tensor, v: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Store (B, K, T, D) keys and values; return all that the new queries may attend to, and their positions.

        Positions are (B or 1, keys).

        If all rows have the same length, keys of a multi-token chunk come in order of position.
        """
        T, held, dtype = k.shape[2], torch.sym_min(self.n_slots, ctx.past_bound), k.dtype
        new = self._packed(k, v)  # in the stored form, so that later passes read the same values
        if not ctx.padded and (T == 1 or ctx.past_bound + T <= self.n_slots):
            self._write(new, ctx)  # evicts no key that these queries attend to
            held = torch.sym_min(self.n_slots, ctx.past_bound + T)
            if ctx.compiled_decode and self.max_length is None:
                held = self.n_slots  # a fixed size avoids recompilation when the ring wraps; empty slots are masked
            seen = [x[:, :, :held] for x in self.tensors()]
            return *self._unpacked(seen, dtype), self._positions(ctx, held, after=True)
        if held == 0:
            self._write(new, ctx)
            return *self._unpacked(new, dtype), ctx.pos
        # Read before writing: the first queries of a chunk need keys that its last tokens evict.
        k_pos = self._positions(ctx, held, after=False)
        rows = max(k_pos.shape[0], ctx.pos.shape[0])
        parts = self._oldest_first(ctx, held)
        seen = [
            torch.cat((*(x[:, :, part] for part in parts), y), dim=2) for x, y in zip(self.tensors(), new, strict=True)
        ]
        self._write(new, ctx)
        k_pos = torch.cat((*(k_pos[:, part].expand(rows, -1) for part in parts), ctx.pos.expand(rows, -1)), dim=1)
        return *self._unpacked(seen, dtype), k_pos

    def _oldest_first(self, ctx: ForwardContext, held: int) -> list[slice]:
        """The slots in order of position, if that is known without reading from the device."""
        if not ctx.uniform or ctx.past_bound <= self.n_slots:
            return [slice(held)]
        oldest = self.n_sink + (ctx.past_bound - self.n_sink) % (self.n_slots - self.n_sink)
        return [slice(self.n_sink), slice(oldest, held), slice(self.n_sink, oldest)]

    def _positions(self, ctx: ForwardContext, held: int, *, after: bool) -> Tensor:
        """(B or 1, held) positions of the slots before or after this pass, shared by layers with equal slots."""
        assert ctx.past is not None
        n_seen = ctx.past + ctx.added if after else ctx.past
        return ctx.memo(
            ("slot_positions", self.n_slots, self.n_sink, after),
            lambda: slot_positions(n_seen, self.n_slots, self.n_sink, held),
        )

    def _slot(self, pos: Tensor) -> Tensor:
        """The slot of each position."""
        rolling = self.n_sink + (pos - self.n_sink) % (self.n_slots - self.n_sink)
        return torch.where(pos < self.n_sink, pos, rolling) if self.n_sink else rolling

    def _write(self, new: Sequence[Tensor], ctx: ForwardContext) -> None:
        if ctx.uniform:
            self._write_uniform(new, ctx)
        else:
            self._write_ragged(new, ctx)

    def _write_uniform(self, new: Sequence[Tensor], ctx: ForwardContext) -> None:
        """If all rows are at the same positions: copy only the tokens that remain, sinks and the end of the chunk."""
        T = new[0].shape[2]
        n_ring = self.n_slots - self.n_sink
        sinks = 0 if T == 1 else min(T, max(0, self.n_sink - ctx.past_bound))
        for part in (slice(0, sinks), slice(max(sinks, T - n_ring), T)):
            if part.start < part.stop:
                slot = self._slot(ctx.pos[0, part])
                for store, x in zip(self.tensors(), new, strict=True):
                    store.index_copy_(2, slot, x[:, :, part])

    def _write_ragged(self, new: Sequence[Tensor], ctx: ForwardContext) -> None:
        """If rows are at different positions: for each slot that may change, find its new token, if any."""
        assert ctx.past is not None
        T, n_ring = new[0].shape[2], self.n_slots - self.n_sink
        n = min(T, n_ring)
        end = (ctx.past + ctx.added)[:, None]  # (B, 1)
        pos = end - n + torch.arange(n, device=end.device)  # (B, n) the last n positions, each in a different ring slot
        slot = self.n_sink + (pos - self.n_sink) % n_ring
        if self.n_sink:
            pinned = torch.arange(self.n_sink, device=end.device).expand(len(end), -1)
            pos = torch.cat((pinned, torch.where(pos < self.n_sink, EMPTY, pos)), dim=1)
            slot = torch.cat((pinned, slot), dim=1)
        is_new = ((pos >= ctx.past[:, None]) & (pos < end) & (pos >= 0))[:, None, :, None]
        source = (pos - ctx.past[:, None]).clamp(0, T - 1)[:, None, :, None]  # (B, 1, n, 1) index among the new tokens
        slot = slot[:, None, :, None]
        for store, x in zip(self.tensors(), new, strict=True):
            B, K, _, D = store.shape
            to, at = slot.expand(B, K, -1, D), source.expand(B, K, -1, D)
            store.scatter_(2, to, torch.where(is_new, x.gather(2, at), store.gather(2, to)))


class Int8KVCache(KVCache):
    """Keys and values in int8, with one scale per token and head."""

    def __init__(
        self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, *, n_sink: int = 0, max_length: int | None
    ):
        """k, v: int8 zeros (B, K, S, D); scales: zeros (B, K, S, 1)."""
        super().__init__(k, v, n_sink=n_sink, max_length=max_length)
        self.k_scale, self.v_scale = k_scale, v_scale

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, self.k_scale, self.v_scale]

    def _packed(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        (k, k_scale), (v, v_scale) = (to_int8(x, SCALE) for x in (k, v))
        return k, v, k_scale, v_scale

    def _unpacked(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v, k_scale, v_scale = stored
        return k.to(dtype) * k_scale.to(dtype), v.to(dtype) * v_scale.to(dtype)


def empty_kv(
    shape: tuple[int, int, int],
    widths: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    n_sink: int,
    max_length: int | None,
) -> KVCache:
    """A cache with (B, K, S) slots for keys and values of these widths; dtype int8 gives an Int8KVCache."""
    k, v = (torch.zeros(*shape, width, device=device, dtype=dtype) for width in widths)
    if dtype != torch.int8:
        return KVCache(k, v, n_sink=n_sink, max_length=max_length)
    scales = (torch.zeros(*shape, 1, device=device, dtype=SCALE) for _ in "kv")
    return Int8KVCache(k, v, *scales, n_sink=n_sink, max_length=max_length)


def kv_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of one key or value of one head, including its scale for int8."""
    return width * dtype.itemsize + (SCALE.itemsize if dtype == torch.int8 else 0)


class Cache:
    """The states of all layers (one per application of a layer in a looped stack), and the position of each row."""

    def __init__(self, layers: Iterable[LayerState], batch_size: int, device: torch.device | str, dtype: torch.dtype):
        self.layers = list(layers)
        self.dtype = dtype  # of keys and values
        self.pos = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,) tokens seen, advanced in place
        self.length = 0  # upper bound of pos, known without reading from the device
        self.ragged = False  # rows may be at different positions
        self.star_context: Tensor | None = None  # (B or 1,) set by the first pass and used by later ones

    @property
    def nbytes(self) -> int:
        """Bytes of all layer states, without the counter `pos`."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def max_length(self) -> int | None:
        """Longest sequence that fits; None if every layer rolls."""
        return min((n for layer in self.layers if (n := layer.max_length) is not None), default=None)

    def advance(self, ctx: ForwardContext) -> None:
        """Advance the positions after a pass through all layers."""
        self.pos += ctx.added
        self.length += ctx.pos.shape[1]
        self.ragged |= ctx.padded

    def reset(self) -> None:
        """Empty the cache without freeing its memory."""
        self.pos.zero_()
        self.length, self.ragged, self.star_context = 0, False, None

    def fork(self, n: int) -> "Cache":
        """A copy with every row repeated n times, to sample several continuations of each prompt."""
        forked = Cache((layer.fork(n) for layer in self.layers), 0, self.pos.device, self.dtype)
        forked.pos = self.pos.repeat_interleave(n)
        forked.length, forked.ragged = self.length, self.ragged
        if self.star_context is not None:
            forked.star_context = self.star_context.expand(len(self.pos)).repeat_interleave(n, dim=0)
        return forked
