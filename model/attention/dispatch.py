"""The one call of an attention kernel, and the table from which it takes the first that serves.

Dimensions: B batch, H query heads, K KV heads, Tq and Tk queries and keys, D head_dim, Dv width of values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model import cpu
from model.attention.kernels import masked
from model.attention.kernels.flex import block_mask, flex
from model.attention.kernels.scores import ScoreMods, one_query
from model.attention.kernels.sdpa import HALF, reads_gqa, sdpa_causal
from model.attention.kernels.tiles import WORKSPACE, block_size, tiles
from model.attention.rope import alibi_slopes
from model.attention.spec import AttentionSpec
from model.context import ForwardContext
from model.errors import UserError

FEWEST = cpu.FEWEST_QUERIES  # of a chunk over a cache, for tiles


class Call(NamedTuple):
    """What is known of a call before it runs, without reading the device."""

    T: int  # queries
    device: torch.device
    dtype: torch.dtype
    contiguous: bool = True  # queries and keys are positions 0 to T - 1
    in_order: bool = False  # keys are in order of position and end with the queries' own: a chunk over a cache
    one_query: bool = False  # one query of each row, inside compiled code

    def hides(self, spec: AttentionSpec) -> bool:
        """Whether the window hides any key from any query, where the call is contiguous."""
        return spec.window is not None and spec.window < self.T


class Inputs(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # (B, H, Tq, D)
    k: Tensor  # (B, K, Tk, D)
    v: Tensor  # (B, K, Tk, Dv)
    k_pos: Tensor  # (B or 1, Tk)
    spec: AttentionSpec
    ctx: ForwardContext
    sink_logit: Tensor | None  # (H,)

    @property
    def mods(self) -> ScoreMods:
        spec = self.spec
        scale = spec.scale or self.q.shape[-1] ** -0.5
        return ScoreMods(scale=scale, softcap=spec.softcap, slopes=self.slopes, sink_logit=self.sink_logit)

    @property
    def slopes(self) -> Tensor | None:
        return alibi_slopes(self.spec.n_head, self.q.device, self.q.dtype) if self.spec.alibi else None

    @property
    def positions(self) -> masked.Positions:
        return masked.Positions(self.ctx.pos, self.k_pos, self.spec, self.ctx.star_context)


def _own_name(spec: AttentionSpec, call: Call, name: str) -> str:
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way of computing attention: an entry of the table."""

    lacks: Callable[[AttentionSpec, Call], str | None]  # why it cannot serve, and what to take; None: it can
    pays: Callable[[AttentionSpec, Call], bool] = lambda spec, call: True  # whether kernel = auto takes it
    run: Callable[[Inputs], Tensor]  # -> (B, H, Tq, Dv)
    variant: Callable[[AttentionSpec, Call, str], str] = _own_name  # the name that is reported
    workspace: dict = field(default_factory=dict)  # operator -> bytes beside arguments and results


def kernel_for(spec: AttentionSpec, call: Call) -> str:
    """The first kernel in the table that serves, or the one that spec.kernel asks for.

    UserError where that one cannot serve self-attention: nothing else is taken silently. Over a cache a mask replaces
    it where it cannot serve.
    """
    asked = spec.kernel
    if asked != "auto" and call.contiguous and not call.one_query:
        if reason := KERNELS[asked].lacks(spec, call):
            raise UserError(f"kernel ({asked}) {reason}")
        return asked
    for name, kernel in KERNELS.items():
        wanted = kernel.pays(spec, call) if asked == "auto" else name in (asked, "one-query", "masked")
        if wanted and kernel.lacks(spec, call) is None:
            return name
    raise AssertionError("the last kernel of the table serves every call")


def kernel_name(spec: AttentionSpec, call: Call) -> str:
    """The kernel and its variant, known before it runs so that every figure can carry it."""
    name = kernel_for(spec, call)
    return KERNELS[name].variant(spec, call, name)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    spec: AttentionSpec,
    ctx: ForwardContext,
    *,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """(B, H, Tq, D) queries at ctx.pos over (B, K, Tk, D) keys and (B, K, Tk, Dv) values at k_pos -> (B, H, Tq, Dv).

    sink_logit (H,) is the learned sink, where spec has one.
    """
    kernel = KERNELS[kernel_for(spec, call_of(q, spec, ctx))]
    return kernel.run(Inputs(q, k, v, k_pos, spec, ctx, sink_logit))


def call_of(q: Tensor, spec: AttentionSpec, ctx: ForwardContext) -> Call:
    """What is known of attention with these queries. Keys that are rotated in the cache have no order to rely on."""
    T, by_place = q.shape[2], spec.rope_in_cache
    return Call(
        T=T,
        device=q.device,
        dtype=q.dtype,
        contiguous=ctx.contiguous and not by_place,
        in_order=ctx.past is not None and ctx.uniform and T > 1 and not by_place,
        one_query=ctx.compiled_decode,
    )


def prepare(spec: AttentionSpec, ctx: ForwardContext, device: torch.device, dtype: torch.dtype) -> None:
    """Leave in ctx.shared what a kernel needs beside its tensors: outside compiled code, once for equal layers."""
    T = ctx.pos.shape[1]
    if ctx.contiguous and kernel_for(spec, Call(T, device, dtype)) == "flex":
        ctx.memo(_mask_key(spec), lambda: block_mask(T, spec.window, spec.n_sink, device))


def workspaces() -> dict:
    """Operators that use more memory than their results -> how to compute it, for estimates of peak memory."""
    return {operator: how for kernel in KERNELS.values() for operator, how in kernel.workspace.items()}


# What each kernel lacks.


def _fused_lacks(spec: AttentionSpec, call: Call) -> str | None:
    """What all fused kernels lack: sparse patterns and modified scores."""
    if spec.sparse is not None:
        return f"does not support {spec.sparse.rule} patterns: take masked or auto"
    if spec.score_mods:
        return f"does not support {spec.score_mods[0]}: take tiles, masked or auto"
    return None


def _sdpa_lacks(spec: AttentionSpec, call: Call) -> str | None:
    if call.hides(spec):
        window = f"{spec.window} of {call.T} tokens"
        return _fused_lacks(spec, call) or f"does not support a window ({window}): take tiles, flex, masked or auto"
    return _fused_lacks(spec, call) or (None if call.contiguous else "needs whole sequences: take auto")


def _flex_lacks(spec: AttentionSpec, call: Call) -> str | None:
    if call.device.type != "cuda":
        return _fused_lacks(spec, call) or f"needs cuda, not {call.device.type}: take tiles or auto"
    return _fused_lacks(spec, call) or (None if call.contiguous else "needs whole sequences: take auto")


def _amx_lacks(spec: AttentionSpec, call: Call) -> str | None:
    if not cpu.attention_serves(spec.head_dim, spec.v_width, call.device, call.dtype):
        here = f"{call.device.type}, {str(call.dtype).removeprefix('torch.')} and {spec.head_dim}"
        return _fused_lacks(spec, call) or f"needs {cpu.attention_needs}, not {here}: take tiles or auto"
    return _fused_lacks(spec, call) or _order_lacks(call)


def _tiles_lacks(spec: AttentionSpec, call: Call) -> str | None:
    if spec.sparse is not None:
        return _fused_lacks(spec, call)
    if not call.contiguous and spec.alibi and spec.n_sink:
        return "cannot tell the distance of a sink from the order of keys: take auto"
    return _order_lacks(call)


def _order_lacks(call: Call) -> str | None:
    return None if call.contiguous or call.in_order else "needs keys in order of position: take auto"


# Where each kernel is the fastest (measured, docs/experiments.md).


def _amx_pays(spec: AttentionSpec, call: Call) -> bool:
    return call.T >= FEWEST


def _tiles_pay(spec: AttentionSpec, call: Call) -> bool:
    if call.contiguous:
        return bool(spec.score_mods) or call.hides(spec) or cpu.prefers_tiles(call.T, call.device, call.dtype)
    if call.device.type != "cpu":
        return False
    return call.T >= FEWEST if call.dtype in HALF else spec.window is not None and call.T >= 128


# How each kernel runs.


def _run_amx(x: Inputs) -> Tensor:
    window = x.k.shape[2] if x.spec.window is None else x.spec.window
    return cpu.attention(x.q, x.k, x.v, window, x.spec.n_sink, x.spec.scale)


def _run_tiles(x: Inputs) -> Tensor:
    (_, H, Tq, _), (K, Tk), spec = x.q.shape, x.k.shape[1:3], x.spec
    window = Tk if spec.window is None else min(spec.window, Tk)
    block = block_size(window, x.q.dtype)
    if Tq < Tk:  # a chunk over a cache: no more scores than a mask would have, however long the text is
        row = H // K * min(Tk, window + block)
        block = min(block, max(FEWEST, 1 << (masked.MASK_ELEMENTS // row).bit_length() - 1))
    numbers = (window, spec.n_sink, block, spec.scale, spec.softcap)
    return tiles(x.q, x.k, x.v, *numbers, x.slopes, x.sink_logit)


def _run_one_query(x: Inputs) -> Tensor:
    return one_query(x.q, x.k, x.v, x.positions.distance(), x.positions.mask(), x.mods)


def _run_flex(x: Inputs) -> Tensor:
    return flex(x.q, x.k, x.v, x.ctx.shared[_mask_key(x.spec)], x.spec.scale)  # type: ignore[arg-type]


def _mask_key(spec: AttentionSpec) -> tuple:
    return "block_mask", spec.window, spec.n_sink


def _run_sdpa(x: Inputs) -> Tensor:
    return sdpa_causal(x.q, x.k, x.v, x.spec.scale)


def _sdpa_variant(spec: AttentionSpec, call: Call, name: str) -> str:
    if spec.n_kv_head == spec.n_head:
        return "sdpa-causal"
    return "sdpa-causal-gqa" if reads_gqa(call.device, call.dtype) else "sdpa-causal-expanded"


def _run_masked(x: Inputs) -> Tensor:
    if x.spec.score_mods:
        return masked.masked_with_mods(x.q, x.k, x.v, x.positions, x.mods)
    return masked.masked(x.q, x.k, x.v, x.positions, x.spec.scale)


def _masked_variant(spec: AttentionSpec, call: Call, name: str) -> str:
    return "masked-scores" if spec.score_mods else "masked"


KERNELS: dict[str, Kernel] = {  # in order of preference
    # one query of each row over a cache, any spec: compiled into loops
    "one-query": Kernel(
        lacks=lambda _, call: None if call.one_query else "is for compiled decoding", run=_run_one_query
    ),
    # windows, sinks and GQA in bfloat16 on a CPU with AMX, chunks over a cache too
    "amx": Kernel(lacks=_amx_lacks, pays=_amx_pays, run=_run_amx, workspace=cpu.attention_workspace),
    # windows and sinks on CUDA, fused
    "flex": Kernel(lacks=_flex_lacks, pays=lambda spec, call: call.hides(spec), run=_run_flex),
    # windows, sinks, GQA and score modifications on any device, work in proportion to the window
    "tiles": Kernel(lacks=_tiles_lacks, pays=_tiles_pay, run=_run_tiles, workspace=WORKSPACE),
    # torch's fused causal attention, where no window hides anything
    "sdpa": Kernel(lacks=_sdpa_lacks, run=_run_sdpa, variant=_sdpa_variant),
    # any positions, patterns and score modifications, by a mask that saves no work
    "masked": Kernel(lacks=lambda spec, call: None, run=_run_masked, variant=_masked_variant),
}
