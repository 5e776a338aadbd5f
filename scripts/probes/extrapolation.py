"""Length extrapolation: perplexity of the same tokens in contexts longer than the training context."""

import math
from typing import Any

from inference.streaming import same_weights
from model.attention.rope import Scaling
from model.errors import UserError
from model.gpt import GPT
from scripts.figure import known, new_figure
from scripts.probes.options import Options
from scripts.probes.perplexity import read
from scripts.probes.results import Curve, Found, column, table
from scripts.probes.subject import Subject

STRETCHES: tuple[Scaling, ...] = ("linear", "yarn")


def extrapolate(subject: Subject, options: Options) -> Found:
    """Perplexity by context length, without overlap, as trained and with RoPE scaled to the context, untrained."""
    block_size, longest = subject.config.model.block_size, options.extrapolate
    assert longest is not None, "called only with --extrapolate"
    if options.context or options.stride:
        raise UserError("--extrapolate chooses the contexts itself: leave out --context and --stride")
    if longest <= block_size:
        raise UserError(f"--extrapolate ({longest}) must be more than the training context ({block_size})")
    contexts = [block_size << n for n in range(math.floor(math.log2(longest / block_size)) + 1)]
    limit = subject.position_limit
    shown = [n for n in contexts if limit is None or n <= limit]
    figures: dict[str, float] = {}
    lines = [("perplexity at", *(f"{n:,}" for n in contexts))]
    curves: dict[str, list[float | None]] = {}
    for rope in (None, *STRETCHES):
        found: dict[int, float] = {}
        for n in shown:
            model = subject.model if rope is None else stretched(subject, rope, n)
            if model is not None:
                reading = read(subject, options, context=n, model=model)
                found[n] = reading.result.perplexity
                figures[column("perplexity", **reading.conditions, rope=rope)] = found[n]
        name = rope or "as trained"
        if found:
            lines.append((name, *(f"{found[n]:.2f}" if n in found else "-" for n in contexts)))
            curves[name] = [found.get(n) for n in contexts]
    head = f"{options.text or 'validation'}, contexts without overlap, training context {block_size}"
    if limit is not None:
        head += f"\nnote: the learned positions of this model limit the context to {limit} tokens"
    elif len(curves) == 1:
        head += "\nnote: no layer has unscaled RoPE without a window, so there is nothing to scale"
    content = {"context": contexts, "block_size": block_size, "perplexity": curves}
    curve = Curve(name="perplexity_by_context", content=content, draw=_draw)
    return Found(figures=figures, text=f"{head}\n{table(lines)}", curve=curve)


def stretched(subject: Subject, scaling: Scaling, context: int) -> GPT | None:
    """The model with RoPE scaled to a context length; None if that changes nothing."""
    factor = context / subject.config.model.block_size
    config = subject.model.config.stretched(scaling, factor) if factor > 1 else None
    return None if config is None else same_weights(subject.model, config)


def _draw(content: dict[str, Any]):
    figure, (axes,) = new_figure("context length (tokens)", ["perplexity"])
    for name, curve in content["perplexity"].items():
        axes.loglog(*known(content["context"], curve), "o-", ms=4, label=name)
    axes.axvline(content["block_size"], color="grey", lw=0.8, ls=":", label="training context")
    axes.legend(frameon=False)
    return figure
