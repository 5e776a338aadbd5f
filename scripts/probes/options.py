"""Options of scripts.evaluate."""

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, field_validator, model_validator

from cli.options import Count, Natural, options_class
from model.device import DType


@options_class
class Options:
    """Evaluate a trained run: loss on any text, by position, beyond the training context; recall by distance."""

    run: tyro.conf.Positional[Path]
    """directory of a run, or of one of its checkpoints"""
    by_position: bool = False
    """measure the loss by position in the context; writes loss_by_position.json"""
    stream: bool = False
    """measure streaming perplexity: one long text decoded with the rolling cache, compared with recomputing each
    window; writes loss_in_stream.json"""
    extrapolate: Count | None = None
    """measure perplexity at context lengths of block_size, twice that, and so on up to this many tokens, also with
    linear and YaRN scaling of RoPE in full layers; writes perplexity_by_context.json"""
    recall: bool = False
    """measure recall accuracy by distance, for runs trained with data.text = recall; writes recall_by_distance.json"""
    attention_to_first: Count | None = None
    """measure the share of attention that later tokens pay to this many first tokens of a context, by layer"""

    context: Count | None = None
    """context length in tokens (default: block_size)"""
    stride: Count | None = None
    """tokens between the starts of two contexts; each token is scored once (default: the context length, no overlap)"""
    tokens: Count | Literal["all"] | None = None
    """maximum number of tokens to predict, or all (default: as many as training evaluates)"""
    text: str | None = None
    """text to evaluate on, a name or a path (default: the run's validation split)"""

    window: Count | None = None
    """with --stream: decode with this window, in tokens, in every layer (default: as trained)"""
    n_sink: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """with --window: number of attention sinks, first tokens that stay visible; one stream for each number
    given"""
    length: Count | None = None
    """with --stream: tokens to predict (default: the whole text)"""
    samples: Count = 512
    """with --stream: number of tokens, spread over the stream, that are also predicted from a recomputed window"""

    checkpoint: Literal["best", "latest"] = "best"
    """checkpoint of the run to evaluate; summary.json has the losses of the latest one"""
    plot: bool = False
    """also draw the curves, as PNG files next to their JSON files"""
    json: bool = False
    """print JSON instead of tables"""
    device: str | None = None
    """device to run on: auto, cpu, cuda or mps (default: as in training)"""
    dtype: DType | None = None
    """dtype of matmuls (default: as in training)"""

    @field_validator("n_sink")
    @classmethod
    def _different(cls, n_sink: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(n_sink)) < len(n_sink):
            raise ValueError("must be numbers without repetition")
        return n_sink

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.n_sink != (0,) and self.window is None:
            raise ValueError(f"--n-sink ({' '.join(map(str, self.n_sink))}) requires --window: give both")
        for name in ("window", "length"):
            if getattr(self, name) is not None and not self.stream:
                raise ValueError(f"--{name} ({getattr(self, name)}) requires --stream: give both")
        return self
