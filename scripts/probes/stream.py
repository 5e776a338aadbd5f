"""Streaming perplexity: a text far longer than the training context, decoded with the cache, against recomputation."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inference.streaming import recomputed_losses, streamed_losses, through_window
from model.errors import UserError
from scripts.figure import known, new_figure
from scripts.probes.options import Options
from scripts.probes.results import Curve, Found, column, table
from scripts.probes.subject import Subject

PARTS = 32  # points of the curve: mean losses of equal parts of the stream


def stream(subject: Subject, options: Options) -> Found:
    """Perplexity of a stream with each cache setting, and with each window recomputed.

    Only `samples` targets are recomputed. The recomputed mean is estimated as the mean streaming loss over all targets,
    minus the mean difference on those samples.
    """
    tokens = subject.tokens(options.text, options.length)
    N = options.length or tokens.n_tokens - 1
    if not 1 <= N < tokens.n_tokens:
        raise UserError(
            f"--length ({N}) must be at most {tokens.n_tokens - 1}, the tokens to predict in {tokens.name}: "
            "use fewer, or a longer text with --text"
        )
    model, runtime, window = subject.model, subject.runtime, options.window
    context = window or subject.config.model.block_size
    subject.check_context(max(N, context))
    ids = torch.from_numpy(tokens.read(0, N + 1).astype("int64")).to(runtime.device)
    at = sample(N, options.samples).to(runtime.device)
    streams = {}
    for k in tqdm(options.n_sink, desc="streams", leave=False, disable=None):
        decoder = model if window is None else through_window(model, window, k)
        streams[k] = streamed_losses(decoder, ids, runtime).double()
    recomputed = recomputed_losses(model, ids, at, context, runtime).double()

    closest = min(streams.values(), key=lambda losses: (losses[at] - recomputed).var(correction=0).item())
    above = closest[at] - recomputed  # a difference has far less variance than the few recomputed losses themselves
    floor = (closest.mean() - above.mean()).item()

    same = {"length": N, "text": options.text and tokens.name, "dtype": options.dtype}
    figures, curves = {}, {}
    lines = [("", "loss", "perplexity", "above recomputed")]
    for k, losses in streams.items():
        name = "as trained" if window is None else f"window {window}, {k} sinks"
        setting = ({} if window is None else {"window": window, "n_sink": k}) | same
        loss = losses.mean().item()
        figures[column("stream_perplexity", **setting)] = math.exp(loss)
        figures[column("stream_minus_recomputed", **setting)] = loss - floor
        lines.append((name, f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{loss - floor:+.4f}"))
        curves[name] = _by_part(losses, torch.arange(N), N)
    figures[column("recomputed_perplexity", context=context, **same)] = math.exp(floor)
    lines.append((name := f"recomputed from {context}", f"{floor:.4f}", f"{math.exp(floor):.2f}", ""))
    curves[name] = _by_part(closest, torch.arange(N), N) - _by_part(above, at, N)
    head = f"{options.text or 'validation'}: a stream of {N:,} tokens, {len(at):,} of them recomputed"
    narrower = [trained for spec in model.config.layers if (trained := getattr(spec, "window", None))]
    if window is not None and min(narrower, default=window) < window:
        head += f"\nnote: layers trained with a window of {min(narrower)} now attend to {window} tokens"
    content = {
        "block_size": subject.config.model.block_size,
        "position": [(part + 0.5) * N / PARTS for part in range(PARTS)],
        "streams": {name: [x if math.isfinite(x) else None for x in curve.tolist()] for name, curve in curves.items()},
    }
    curve = Curve(name="loss_in_stream", content=content, draw=_draw)
    return Found(figures=figures, text=f"{head}\n{table(lines)}", curve=curve)


def sample(N: int, n: int) -> Tensor:
    """A fixed random sample with one target from each of n equal parts of N targets: (min(n, N),), ascending.

    Random rather than evenly spaced, since a text may be periodic.
    """
    n = min(n, N)
    within = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(n) + within) * (N / n)).long().clamp(max=N - 1)


def _by_part(values: Tensor, at: Tensor, N: int) -> Tensor:
    """Means of `values`, measured at the targets `at`, over PARTS equal parts of a stream of N targets: (PARTS,)."""
    part = at.cpu() * PARTS // N
    return torch.bincount(part, values.cpu(), minlength=PARTS) / torch.bincount(part, minlength=PARTS)


def _draw(content: dict[str, Any]):
    figure, (axes,) = new_figure("position in the stream (tokens)", ["loss (nats per token)"])
    for name, curve in content["streams"].items():
        axes.plot(*known(content["position"], curve), "o-", ms=3, label=name)
    axes.axvline(content["block_size"], color="grey", lw=0.8, ls=":", label="training context")
    axes.legend(frameon=False)
    return figure
