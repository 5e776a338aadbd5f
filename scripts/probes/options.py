"""Options of scripts.evaluate."""

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, field_validator, model_validator

from cli.options import Count, Natural, options_class
from model.device import DType


@options_class
class Options:
    """Evaluate a trained run: loss on any text, by position, far beyond the training context; recall by distance."""

    run: tyro.conf.Positional[Path]
    """a run's directory, or one of its checkpoints"""
    by_position: bool = False
    """loss by position in the context, written to loss_by_position.json"""
    stream: bool = False
    """perplexity of one long stream through the rolling cache, compared with recomputing every window, written to
    loss_in_stream.json"""
    extrapolate: Count | None = None
    """perplexity at contexts of block_size, twice that, and so on up to this many tokens, written to
    perplexity_by_context.json; with RoPE in all layers also with linear and YaRN scaling"""
    recall: bool = False
    """accuracy of recall by distance, written to recall_by_distance.json: for runs trained on data.text = recall"""
    attention_to_first: Count | None = None
    """mean attention probability on this many first tokens of a context, by layer"""

    context: Count | None = None
    """tokens in a context (default: block_size)"""
    stride: Count | None = None
    """tokens from the start of one context to the start of the next; only new tokens count (default: no overlap)"""
    tokens: Count | Literal["all"] | None = None
    """most tokens to predict (default: as many as training evaluates)"""
    text: str | None = None
    """evaluate on another text than the run's validation split: a name or a path"""

    window: Count | None = None
    """with --stream: decode with this window in every layer (default: as trained)"""
    n_sink: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """with --window: first tokens that stay visible; one stream for each of several numbers"""
    length: Count | None = None
    """with --stream: tokens to predict (default: the whole text)"""
    samples: Count = 512
    """with --stream: tokens, spread over the stream, that are also predicted from only their last --window tokens"""

    checkpoint: Literal["best", "latest"] = "best"
    """which checkpoint of the run; the losses in summary.json are those of the latest"""
    plot: bool = False
    """draw curves as PNG files next to their JSON"""
    json: bool = False
    """print JSON instead of tables"""
    device: str | None = None
    """auto, cpu, cuda or mps (default: as in training)"""
    dtype: DType | None = None
    """dtype of matrix products (default: as in training)"""

    @field_validator("n_sink")
    @classmethod
    def _different(cls, n_sink: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(n_sink)) < len(n_sink):
            raise ValueError("must be different numbers")
        return n_sink

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.n_sink != (0,) and self.window is None:
            raise ValueError(f"--n-sink ({' '.join(map(str, self.n_sink))}) has an effect only with --window: give one")
        for name in ("window", "length"):
            if getattr(self, name) is not None and not self.stream:
                raise ValueError(f"--{name} ({getattr(self, name)}) has an effect only with --stream: give both")
        return self
