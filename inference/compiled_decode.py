"""Compiled decoding: one token of each row at a time, each layer under torch.compile.

Decoding is bound by reading the weights, so matmuls of few rows become loops that read them once (inference/gemv.py).
Each layer is compiled separately: equal layers share one compilation, for any context length.

Dimensions: B rows, C n_embd.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from inference.gemv import with_gemv
from model import cpu
from model.context import ForwardContext
from model.cost import step_bytes
from model.device import Runtime, Switch, no_compiling
from model.errors import UserError
from model.gpt import GPT, Tensors
from model.state import LayerState

MOST_COMPILED = 256  # recompilation limit: combinations of layer kind, batch size and cache in one process

KIND_S, LAYER_S, BYTE_S = 4.0, 2e-4, 3e-11  # seconds to compile a kind of layer; saved per token: by layer, by byte

Function = TypeVar("Function", bound=Callable)


def should_compile(asked: Switch, model: GPT, runtime: Runtime, n_steps: int) -> bool:
    """Whether to compile for n_steps; `auto` does if it saves more time than it costs. UserError if impossible."""
    obstacle = no_compiling(runtime.device)
    if asked == "on" and obstacle is not None:
        raise UserError(f"--compile (on) has nothing to compile with ({obstacle}): take off, or auto")
    if asked != "auto":
        return asked == "on"
    if obstacle is not None:
        return False
    costs = KIND_S * (1 + len(set(model.config.layers)))
    saves = LAYER_S * len(model.config.applied_layers) + BYTE_S * step_bytes(model)
    return n_steps * saves > costs


def use_compiled_decode(model: GPT, on: bool = True) -> None:
    """Switch compiled decoding of single tokens on or off."""
    model.compiled_decode = CompiledLayers() if on else None


class CompiledLayers:
    """Compiled layers and head, which GPT calls in place of its own for one token of each row."""

    def layer(
        self, block: nn.Module, x: Tensor, ctx: ForwardContext, passed: Tensors, state: LayerState
    ) -> tuple[Tensor, Tensors, Tensors]:
        """block(x, ctx, passed, state), compiled: (B, 1, C) -> (B, 1, C)."""
        assert ctx.past is not None
        length = torch.empty(1).expand(ctx.past_bound)  # a number that may change without recompiling
        torch._dynamo.maybe_mark_dynamic(length, 0)
        return compiled(_layer)(block, x, ctx.pos, ctx.past, length, ctx.uniform, ctx.star_context, passed, state)

    def linear(self, linear: nn.Module, x: Tensor) -> Tensor:
        """linear(x), compiled."""
        return compiled(_linear)(linear, x)


@cache
def compiled(function: Function) -> Function:
    """The function under torch.compile; compiled once per function."""
    cpu.keep_compiled_code()
    torch._dynamo.config.recompile_limit = max(MOST_COMPILED, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, backend=backend)  # type: ignore[return-value]


def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """Inductor, with matmuls of few rows rewritten as loops, and on a CPU without Python between its kernels."""
    from torch._inductor.compile_fx import compile_fx

    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
    return compile_fx(with_gemv(graph), inputs, config_patches={"cpp_wrapper": on_cpu})  # type: ignore[return-value]


def _layer(
    block: nn.Module,
    x: Tensor,
    pos: Tensor,
    past: Tensor,
    length: Tensor,
    uniform: bool,
    star_context: Tensor | None,
    passed: Tensors,
    state: LayerState,
) -> tuple[Tensor, Tensors, Tensors]:
    ctx = ForwardContext(
        pos=pos,
        contiguous=False,
        uniform=uniform,
        past=past,
        added=1,
        past_bound=length.shape[0],
        star_context=star_context,
        compiled_decode=True,
    )
    return block(x, ctx, passed, state)


def _linear(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x)
