"""A text far longer than the training context, decoded as generate.py does, against recomputation."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import UserError
from model.streaming import recomputed_losses, streamed_losses, through_window
from scripts.evaluate.options import Options
from scripts.evaluate.results import Curve, Found, column, table
from scripts.evaluate.subject import Subject
from scripts.report import new_figure

BINS = 32  # parts of a stream whose loss is drawn


def stream(subject: Subject, options: Options) -> Found:
    """Perplexity of one stream through each cache; `samples` of its targets, evenly spaced, are also recomputed."""
    tokens = subject.tokens(options.text, options.length)
    N = options.length or tokens.n_tokens - 1
    if not 1 <= N < tokens.n_tokens:
        raise UserError(
            f"--length ({N}) is more than the {tokens.n_tokens - 1} tokens to predict of {tokens.name}: "
            "take less, or a longer text with --text"
        )
    model, runtime, window = subject.model, subject.runtime, options.window
    context = window or subject.config.model.block_size
    subject.check_context(max(N, context))
    ids = torch.from_numpy(tokens.read(0, N + 1).astype("int64")).to(runtime.device)
    at = torch.linspace(0, N - 1, min(options.samples, N), dtype=torch.float64).round().long().to(runtime.device)
    streams = {}
    for k in tqdm(options.n_sink, desc="streams", leave=False, disable=None):
        decoder = model if window is None else through_window(model, window, k)
        streams[k] = streamed_losses(decoder, ids, runtime).double()
    recomputed = recomputed_losses(model, ids, at, context, runtime).double()

    same = {"length": N, "text": options.text and tokens.name}
    figures, curves = {}, {}
    lines = [("", "loss", "perplexity", "above recomputed, on the same tokens")]
    for k, losses in streams.items():
        name = "as trained" if window is None else f"window {window}, {k} sinks"
        setting = ({} if window is None else {"window": window, "n_sink": k}) | same
        above = (losses[at] - recomputed).mean().item()
        figures[column("stream_perplexity", **setting)] = losses.mean().exp().item()
        figures[column("stream_minus_recomputed", **setting)] = above
        lines.append((name, *_cells(losses), f"{above:+.4f}"))
        curves[name] = _curve(losses.cpu(), torch.arange(N), N)
    figures[column("recomputed_perplexity", context=context, **same)] = recomputed.mean().exp().item()
    lines.append((name := f"recomputed from {context}", *_cells(recomputed), ""))
    curves[name] = _curve(recomputed.cpu(), at.cpu(), N)
    head = f"{options.text or 'validation'}: a stream of {N:,} tokens, {len(at):,} of them, evenly spaced, recomputed"
    content = {"block_size": subject.config.model.block_size, "streams": curves}
    curve = Curve(name="loss_in_stream", content=content, draw=_draw)
    return Found(figures=figures, text=f"{head}\n{table(lines)}", curve=curve)


def _cells(losses: Tensor) -> tuple[str, str]:
    return f"{losses.mean():.4f}", f"{losses.mean().exp():.2f}"


def _curve(losses: Tensor, at: Tensor, N: int) -> dict[str, list[float]]:
    """Mean loss over each of BINS equal parts of a stream of N targets; losses are of the targets `at`."""
    parts = at * BINS // N
    count = torch.bincount(parts, minlength=BINS)
    loss = torch.bincount(parts, losses, minlength=BINS) / count
    position = torch.bincount(parts, at + 1.0, minlength=BINS) / count
    return {"position": position[count > 0].tolist(), "loss": loss[count > 0].tolist()}


def _draw(content: dict[str, Any]):
    figure, (axes,) = new_figure("tokens of the stream", ["loss (nats per token)"])
    for name, curve in content["streams"].items():
        axes.plot(curve["position"], curve["loss"], "o-", ms=3, label=name)
    axes.axvline(content["block_size"], color="grey", lw=0.8, ls=":", label="training context")
    axes.legend(frameon=False)
    return figure
