"""attend() by the positions of queries and keys, as tests call it: with the context that GPT would make."""

import torch
from torch import Tensor

from model.attention import dispatch
from model.attention.dispatch import Call
from model.attention.spec import AttentionSpec
from model.context import ForwardContext


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    spec: AttentionSpec,
    *,
    sink_logit: Tensor | None = None,
    contiguous: bool = False,
    in_order: bool = False,
) -> Tensor:
    """contiguous: positions 0 to T - 1; in_order: a chunk over a cache of rows of one length."""
    past = q_pos[:, 0] if in_order else None
    ctx = ForwardContext(pos=q_pos, contiguous=contiguous, uniform=in_order, past=past)
    return dispatch.attend(q, k, v, k_pos, spec, ctx, sink_logit=sink_logit)


def kernel_name(spec: AttentionSpec, T: int, device: torch.device, dtype: torch.dtype, **known: bool) -> str:
    """The kernel for T queries."""
    return dispatch.kernel_name(spec, Call(T, device, dtype, **known))
