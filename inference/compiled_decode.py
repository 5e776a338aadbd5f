"""A step of decoding, compiled: a few rows at a time, where what takes the time is reading the weights.

Each layer is compiled alone, so that equal layers share one compilation, for any length of the text.

Dimensions: B rows, C n_embd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from model.cpu.cpp_build import keep_compiled_code
from model.device import Runtime, Switch, no_compiling
from model.errors import UserError
from inference.gemv import with_sums
from model.memory import step_bytes
from model.context import Step

if TYPE_CHECKING:
    from model.cache import LayerState
    from model.gpt import GPT

MOST_COMPILED = 256  # kinds of layers, batches and caches in one process

KIND_S, LAYER_S, BYTE_S = 4.0, 2e-4, 3e-11  # compiling a kind of layer; what it saves a token: by layer, by byte read

Function = TypeVar("Function", bound=Callable)


def compiling(asked: Switch, model: GPT, runtime: Runtime, n_steps: int) -> bool:
    """Whether to compile for so many steps; `auto` does where that takes less time in all."""
    obstacle = no_compiling(runtime.device)
    if asked == "on" and obstacle is not None:
        raise UserError(f"--compile (on) has nothing to compile with ({obstacle}): take off, or auto")
    if asked != "auto":
        return asked == "on"
    if obstacle is not None:
        return False
    costs = KIND_S * (1 + len(set(model.config.layers)))
    saves = LAYER_S * model.config.n_layer + BYTE_S * step_bytes(model)
    return n_steps * saves > costs


@cache
def compiled(function: Function) -> Function:
    """The function as one piece, compiled when it is called; every caller gets the same."""
    keep_compiled_code()
    torch._dynamo.config.recompile_limit = max(MOST_COMPILED, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, backend=backend)  # type: ignore[return-value]


def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """torch's own compiler, given sums in place of products of few rows, and calling its loops from C++ on a CPU."""
    from torch._inductor.compile_fx import compile_fx

    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
    return compile_fx(with_sums(graph), inputs, config_patches={"cpp_wrapper": on_cpu})  # type: ignore[return-value]


def layer(block: nn.Module, x: Tensor, step: Step, state: LayerState) -> Tensor:
    """block(x, step, state) for one token of each row, compiled: (B, 1, C) -> (B, 1, C)."""
    assert step.past is not None
    length = torch.empty(1).expand(step.past_bound)  # a number that may change without compiling again
    torch._dynamo.maybe_mark_dynamic(length, 0)
    return compiled(_layer)(block, x, step.pos, step.past, length, step.uniform, step.context, state)


def product(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), compiled."""
    return compiled(_product)(linear, x)


def _layer(
    block: nn.Module,
    x: Tensor,
    pos: Tensor,
    past: Tensor,
    length: Tensor,
    uniform: bool,
    context: Tensor | None,
    state: LayerState,
) -> Tensor:
    step = Step(
        pos=pos,
        contiguous=False,
        uniform=uniform,
        past=past,
        added=1,
        past_bound=length.shape[0],
        context=context,
        fused=True,
    )
    return block(x, step, state)


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x)
