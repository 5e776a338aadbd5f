"""Loss, perplexity and bits per byte on a stream of tokens, and loss by position in the context."""

import math
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data.loader import eval_batches, stream_hash
from model.errors import UserError
from model.gpt import GPT
from scripts.figure import new_figure
from scripts.probes.options import Options
from scripts.probes.results import Curve, Found, column, table
from scripts.probes.subject import Subject
from training.evaluate import Evaluation, LossByPosition, evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The result of one pass over the stream of tokens."""

    result: Evaluation
    by_position: LossByPosition
    digest: str  # hash of the stream
    conditions: dict[str, object]  # settings that differ from training's


def perplexity(subject: Subject, options: Options) -> Found:
    """Score every target once; all but those of the first context have at least context - stride tokens before them."""
    context = options.context or subject.config.model.block_size
    stride = options.stride or context
    if stride > context:
        raise UserError(f"--stride ({stride}) must be at most the context length ({context}), or tokens are skipped")
    subject.check_context(context)
    reading = read(subject, options, context=context, stride=stride)
    result, by_position = reading.result, reading.by_position
    values = {key: getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}
    lines = [("loss", f"{result.loss:.4f}"), ("perplexity", f"{result.perplexity:.4f}")]
    lines.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    curve = None
    if options.by_position:
        if math.isfinite(last := by_position.tail(0.25)):  # nan if no context is long enough
            values["loss_last_quarter"] = last
            lines.append(("loss in the last quarter of the context", f"{last:.4f}"))
        positions, losses = by_position.curve()
        content = {"position": positions, "loss": losses, "context": context, "stride": stride}
        curve = Curve(name="loss_by_position", content=content | {"stream_hash": reading.digest}, draw=_draw)
    how = f"{result.n_tokens:,} tokens, context {context}, stride {stride}, stream {reading.digest}"
    figures = {column(key, **reading.conditions): value for key, value in values.items()}
    return Found(figures=figures, text=f"{options.text or 'validation'}: {how}\n{table(lines)}", curve=curve)


def read(
    subject: Subject, options: Options, *, context: int, stride: int | None = None, model: GPT | None = None
) -> Reading:
    """Evaluate the run's model, or `model`, in contexts that start every `stride` tokens (default: no overlap)."""
    block_size, eval_tokens = subject.config.model.block_size, subject.config.train.eval_tokens
    requested = eval_tokens if options.tokens is None else options.tokens
    max_tokens = None if requested == "all" else requested
    tokens = subject.tokens(options.text, max_tokens)
    rows = subject.batch_rows(context)
    batches = eval_batches(tokens, block_size=context, batch_size=rows, max_tokens=max_tokens, stride=stride)
    by_position = LossByPosition(context)
    shown = tqdm(batches, desc="perplexity", unit="batch", leave=False, disable=None)
    token_bytes = subject.tokenizer.token_bytes()
    result = evaluate(model or subject.model, shown, token_bytes, subject.runtime, observe=by_position.add)
    digest = stream_hash(tokens, context, max_tokens, stride=stride)
    conditions: dict[str, object] = {
        "context": context if context != block_size else None,
        "stride": stride if stride != context else None,
        "tokens": result.n_tokens if max_tokens != eval_tokens else None,
        "text": options.text and f"{tokens.name}-{digest[:8]}",
        "dtype": options.dtype,
    }
    return Reading(result=result, by_position=by_position, digest=digest, conditions=conditions)


def _draw(content: dict[str, Any]):
    figure, (axes,) = new_figure("position in the context (tokens)", ["loss (nats per token)"])
    axes.semilogx(content["position"], content["loss"], "o-", ms=3)
    return figure
