"""What can be asked of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cli.program import at_least
from model.device import DType
from model.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Evaluate a trained run: loss on any text, by position, far beyond the training length; recall by distance."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's directory, or one of its checkpoints."""
    by_position: bool = False
    """Loss by position in the context, into loss_by_position.json."""
    stream: bool = False
    """Perplexity of one long stream through the rolling cache, against recomputation, into loss_in_stream.json."""
    extrapolate: int | None = None
    """Perplexity at block_size, twice that, and so on up to this context, into perplexity_by_context.json; networks
    with RoPE over all tokens also with it stretched: linear, yarn."""
    recall: bool = False
    """How often values are recalled, by distance, into recall_by_distance.json: for runs on data.text = recall."""
    attention_to_first: int | None = None
    """Mean attention probability that goes to this many first tokens of a context, by layer."""

    context: int | None = None
    """Tokens in a context; none: block_size."""
    stride: int | None = None
    """Tokens from one context's beginning to the next's, which counts only what is new; none: no overlap."""
    tokens: int | Literal["all"] | None = None
    """Targets to predict at most; none: as many as training evaluates."""
    text: str | None = None
    """Another text than the run's validation split: a name or a path."""

    window: int | None = None
    """With --stream: decode through a window, in every layer; none: as trained."""
    n_sink: tuple[int, ...] = (0,)
    """With --window: first tokens that stay visible; several numbers: a stream for each."""
    length: int | None = None
    """With --stream: targets to predict; none: the whole text."""
    samples: int = 512
    """With --stream: targets, drawn over its length, that are computed again from their last --window tokens alone."""

    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of the run; the losses of summary.json are of the latest."""
    plot: bool = False
    """Draw what has a curve, as PNG beside its JSON."""
    json: bool = False
    """Print JSON instead of tables."""
    device: str | None = None
    """auto, cpu, cuda, mps; none: as in training."""
    dtype: DType | None = None
    """Of matrix products; none: as in training."""


def check(options: Options) -> None:
    """UserError for a value out of its range, or one that nothing asked for needs."""
    at_least(options, attention_to_first=1, extrapolate=1, context=1, stride=1, tokens=1, window=1, length=1, samples=1)
    if not options.n_sink or min(options.n_sink) < 0 or len(set(options.n_sink)) < len(options.n_sink):
        raise UserError(f"--n-sink ({' '.join(map(str, options.n_sink))}) must be numbers from 0 on, each once")
    if options.n_sink != (0,) and options.window is None:
        raise UserError(f"--n-sink ({' '.join(map(str, options.n_sink))}) means something with --window only: give one")
    for name in ("window", "length"):
        if getattr(options, name) is not None and not options.stream:
            raise UserError(f"--{name} ({getattr(options, name)}) means something with --stream only: give both")
