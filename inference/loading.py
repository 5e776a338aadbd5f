"""A trained model loaded for generation: loaded once, shared by any number of sessions."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from artifacts.run_dir import RunDir
from data.tokenizer import Tokenizer
from inference.compiled_decode import should_compile, use_compiled_decode
from inference.params import CacheParams, ModelParams
from inference.quantize import quantize
from inference.streaming import through_window
from model.cache import Cache
from model.device import Runtime, resolve
from model.errors import UserError
from model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Weights, tokenizer and device; generating does not modify them. `lock` is held for one step at a time."""

    model: GPT
    tokenizer: Tokenizer
    runtime: Runtime
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def position_limit(self) -> int | None:
        """Number of learned positions, which limits the text in tokens; None: no limit."""
        return None if self.model.wpe is None else self.model.config.block_size

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; an empty prompt becomes the end-of-text token, after which a new document begins."""
        return self.tokenizer.encode(text) or [self.tokenizer.eot]

    def new_cache(self, batch_size: int, max_length: int, params: CacheParams) -> Cache | None:
        """An empty cache for texts of up to max_length tokens; None if params.cache is `none`."""
        if params.cache == "none":
            return None
        dtype = torch.int8 if params.cache_dtype == "int8" else None  # None: the dtype of the weights
        return self.model.new_cache(batch_size, max_length, dtype=dtype, rolling=params.cache == "rolling")


def load(path: Path, params: ModelParams | None = None, *, n_steps: int = 10**6) -> LoadedModel:
    """The model of a run's directory or of one of its checkpoints.

    `n_steps` is the expected number of decoding steps, by which `compile = auto` decides.
    """
    params = params or ModelParams()
    runtime = resolve(params.device, params.dtype, "off")
    model, tokenizer = RunDir.of(path).load(path, params.checkpoint)
    if ahead := sorted({spec.kind for spec in model.config.layers if not spec.causal}):
        raise UserError(f"{', '.join(ahead)} layers are not causal: {path} cannot generate text")
    if params.window is not None:
        in_cache = params.positions == "in-cache"
        model = through_window(model, params.window, params.n_sink, rope_in_cache=in_cache)
        if in_cache and not any(getattr(spec, "rope_in_cache", False) for spec in model.config.layers):
            raise UserError("positions (in-cache) needs layers that rotate keys (RoPE): this run has none")
    model = model.to(runtime.device, runtime.dtype).eval()
    if params.weights == "int8":
        model = quantize(model)
    use_compiled_decode(model, should_compile(params.compile, model, runtime, n_steps))
    return LoadedModel(model=model, tokenizer=tokenizer, runtime=runtime)
