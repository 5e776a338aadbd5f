"""Parameters of generation: sampling, KV cache, and the loading of the model.

Each field is declared once, with its default, range and description, for both the command line and a server.
"""

from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from model.device import DType, Switch

LARGEST = 10**15  # well within 64 bits

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Probability = Annotated[float, Field(gt=0, le=1)]
StopString = Annotated[str, Field(min_length=1)]


class Params(BaseModel):
    """Base class: frozen, rejects unknown names, and takes the string below a field as its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class SamplingParams(Params):
    """How tokens are sampled, and where the text ends."""

    max_new_tokens: Count = 200
    """maximum number of tokens to generate for each prompt or turn; may exceed the training context (block_size)"""
    num_samples: Annotated[int, Field(ge=1, le=10_000)] = 1
    """number of continuations of each prompt; the prompt is processed once for all of them"""
    stop: tyro.conf.UseAppendAction[tuple[StopString, ...]] = ()
    """stop string: end the text before it; repeat the option for several strings"""
    stop_at_end: bool = True
    """end the text when the model generates its end-of-text token"""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """divide the logits by this before sampling: below 1 more predictable, above 1 more varied; 0: greedy decoding"""
    top_k: Count | None = None
    """sample only from the k most likely tokens"""
    top_p: Probability | None = None
    """nucleus sampling: sample only from the most likely tokens whose probabilities add up to this"""
    min_p: Probability | None = None
    """sample only from tokens at least this fraction as likely as the most likely one"""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """values above 1 make tokens that already occur in the text less likely; 1: off"""
    seed: int = 0
    """random seed of sampling; the same seed and prompt give the same text whatever the batch, chunk and cache,
    rounding aside"""


class CacheParams(Params):
    """How the KV cache is stored."""

    cache: Literal["rolling", "full", "none"] = "rolling"
    """KV cache. rolling: sliding layers keep only their window; full: all layers keep all keys; none: recompute the
    whole text for every token"""
    cache_dtype: Literal["as-dtype", "int8"] = "as-dtype"
    """dtype of the KV cache. as-dtype: that of the weights; int8: 8-bit keys and values with scales, about half the
    memory of bfloat16, slightly different logits"""
    chunk: Count = 512
    """prefill chunk: prompt tokens per forward pass; smaller chunks need less memory; the text is the same, rounding
    aside"""
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = 8192
    """in a conversation: number of tokens, yours and the model's together, that full-attention layers have room for"""


class ModelParams(Params):
    """Which weights are loaded, and how the model runs."""

    checkpoint: Literal["best", "latest"] = "best"
    """checkpoint to load from a run's directory"""
    window: Count | None = None
    """decode with a sliding window of this many tokens in all layers (default: as trained)"""
    n_sink: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """with a window: number of attention sinks, first tokens that stay visible"""
    positions: Literal["absolute", "in-cache"] = "absolute"
    """with a window: RoPE positions of keys. absolute: position in the text; in-cache: position in the cache, as in
    StreamingLLM"""
    device: str = "auto"
    """device to run on: auto, cpu, cuda or mps"""
    dtype: DType = "auto"
    """dtype of weights and KV cache; auto: bfloat16 where the hardware multiplies it natively, else float32"""
    weights: Literal["as-dtype", "int8"] = "as-dtype"
    """dtype of weight matrices. int8: 8 bits with a scale per row; half the memory traffic of
    bfloat16, slightly different logits"""
    compile: Switch = "auto"
    """compile the layers for decoding: takes seconds, then runs two to four times as fast; auto: compile if enough
    tokens are generated to save time overall"""

    @field_validator("n_sink", "positions")
    @classmethod
    def _of_a_window(cls, value: object, info: ValidationInfo) -> object:
        if value not in (0, "absolute") and info.data.get("window") is None:
            raise ValueError("has an effect only with a window")
        return value
