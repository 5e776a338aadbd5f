"""What a generation may be told: how tokens are sampled, how the cache is kept, which weights run and where.

Each field is declared here once, with its default, range and description, for the command line and for a server.
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
    """Frozen; unknown names are refused; the text below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class SamplingParams(Params):
    """How the continuation is chosen, and where it ends."""

    max_new_tokens: Count = 200
    """most tokens to generate for each prompt or turn; may exceed the training context (block_size)"""
    num_samples: Annotated[int, Field(ge=1, le=10_000)] = 1
    """continuations of each prompt; the prompt is read once for all of them"""
    stop: tyro.conf.UseAppendAction[tuple[StopString, ...]] = ()
    """end the text before this string; repeat the option for several strings"""
    stop_at_end: bool = True
    """end the text where the model generates its end-of-text token"""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """divides the logits before sampling: below 1 more predictable, above 1 more varied; 0 is greedy decoding"""
    top_k: Count | None = None
    """sample only from the k most likely tokens"""
    top_p: Probability | None = None
    """nucleus sampling: only from the most likely tokens whose probabilities add up to this"""
    min_p: Probability | None = None
    """sample only from tokens at least this fraction as likely as the most likely one"""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """above 1, tokens that already occur in the text become less likely; 1 is off"""
    seed: int = 0
    """seed of the sampling noise: the same seed and prompt give the same text, whatever the batch, chunk and cache"""


class CacheParams(Params):
    """How the key/value cache is kept."""

    cache: Literal["rolling", "full", "none"] = "rolling"
    """rolling: sliding layers keep only their window; full: every layer keeps all keys; none: recompute the whole text
    for every token"""
    cache_dtype: Literal["as-dtype", "int8"] = "as-dtype"
    """int8: 8-bit keys and values with a scale each; about half the memory, slightly different logits"""
    chunk: Count = 512
    """tokens of the prompt to read in one forward pass; fewer take less memory and change no text"""
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = 8192
    """in a conversation: tokens, yours and the model's, that layers with full attention have room for"""


class ModelParams(Params):
    """Which weights are loaded, and how they run."""

    checkpoint: Literal["best", "latest"] = "best"
    """checkpoint to load where a run's directory is given"""
    window: Count | None = None
    """make every layer slide with a window of this many tokens, whatever the model was trained with"""
    n_sink: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """with a window: first tokens that stay visible (attention sinks)"""
    positions: Literal["absolute", "in-cache"] = "absolute"
    """with a window: rotate keys by their position in the text, or by their place in the cache as StreamingLLM does"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: DType = "auto"
    """dtype of weights and cache"""
    weights: Literal["as-dtype", "int8"] = "as-dtype"
    """int8: 8-bit weight matrices with a scale for each row; half the memory traffic, slightly different logits"""
    compile: Switch = "auto"
    """compile the layers for decoding: takes seconds at first, then two to four times the speed; auto: when enough
    tokens are to be generated to make up for it"""

    @field_validator("n_sink", "positions")
    @classmethod
    def _of_a_window(cls, value: object, info: ValidationInfo) -> object:
        if value not in (0, "absolute") and info.data.get("window") is None:
            raise ValueError("has an effect only with a window")
        return value
